"""DeepSeek's expert load balancer, written down from its published description: the reference for `experts/eplb/`.

Every device holds the same number of physical experts, two copies of one expert may meet on one device, and the plan
that is in force plays no part. Source: the README of github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437, 3.4.1.
"""


def replicate_hottest(loads, num_copies):
    """How many copies each expert gets: the next one always goes to the expert with the most load per copy."""
    counts = [1] * len(loads)
    for _ in range(num_copies - len(loads)):
        hottest = max(range(len(loads)), key=lambda expert: loads[expert] / counts[expert])
        counts[hottest] += 1
    return counts


def pack_evenly(weights, num_packs):
    """The pack of each item: heaviest first, each into the lightest pack that lacks items. Packs hold equally many."""
    room = [len(weights) // num_packs] * num_packs
    totals = [0.0] * num_packs
    pack_of = [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((pack for pack in range(num_packs) if room[pack]), key=lambda pack: totals[pack])
        pack_of[item] = pack
        totals[pack] += weights[item]
        room[pack] -= 1
    return pack_of


def rebalance_layer(loads, num_copies, num_groups, num_nodes, num_devices):
    """The experts on each device, for one layer: list of num_devices lists with num_copies / num_devices ids.

    Hierarchical where num_nodes divides num_groups: groups of consecutive experts to nodes, copies within a node,
    copies to the node's devices. Otherwise global: one group, one node.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(loads) // num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    node_of = pack_evenly([sum(loads[expert] for expert in group) for group in groups], num_nodes)
    devices = []
    for node in range(num_nodes):
        experts = [expert for group, home in zip(groups, node_of, strict=True) if home == node for expert in group]
        counts = replicate_hottest([loads[expert] for expert in experts], num_copies // num_nodes)
        copies = [expert for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
        per_copy = [loads[expert] / count for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
        device_of = pack_evenly(per_copy, num_devices // num_nodes)
        for device in range(num_devices // num_nodes):
            devices.append([expert for expert, home in zip(copies, device_of, strict=True) if home == device])
    return devices


def layer_cost(loads, devices):
    """The load of the slowest device, an expert's load split evenly over all its copies."""
    counts = [sum(held.count(expert) for held in devices) for expert in range(len(loads))]
    return max(sum(loads[expert] / counts[expert] for expert in held) for held in devices)
