"""Writes the dashboards beside it:   python deploy/grafana/build.py

A panel is a title, what to do with it, a unit and expressions by legend; `$job` is a scrape job, that is a cluster.
Knows no metric's meaning: that is in the metrics' help texts, which the descriptions here repeat in few words.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ONE = '{job=~"$job"}'  # the cluster that is looked at
WIDTH = 24  # of Grafana's grid

Panel = dict[str, Any]


def panel(title: str, description: str, unit: str, queries: dict[str, str], kind: str = "timeseries",
          width: int = 8, height: int = 8, **options: Any) -> Panel:  # fmt: skip
    """queries: expressions by legend; in a legend {{label}} is the label's value.  unit: Grafana's id of one."""
    targets = [
        {"refId": chr(ord("A") + n), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
        for n, (legend, expr) in enumerate(queries.items())
    ]
    custom = {"fillOpacity": 10, "showPoints": "never"} if kind == "timeseries" else {}
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": custom}, "overrides": []},
        "gridPos": {"w": width, "h": height},
        "options": options,
    }


def stat(title: str, description: str, unit: str, expr: str, red_from: float | None = None) -> Panel:
    """One number. red_from: where it turns red."""
    made = panel(title, description, unit, {"": expr}, kind="stat", width=4, height=4, colorMode="background")
    steps = [{"value": None, "color": "green"}]
    if red_from is not None:
        steps.append({"value": red_from, "color": "red"})
    made["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": steps}
    return made


def heatmap(title: str, description: str, metric: str) -> Panel:
    """A histogram over time, in seconds."""
    queries = {"{{le}}": per_second(f"{metric}_bucket", "le")}
    color = {"mode": "scheme", "scheme": "Oranges"}
    made = panel(title, description, "s", queries, "heatmap", 12, calculate=False, yAxis={"unit": "s"}, color=color)
    made["targets"][0]["format"] = "heatmap"
    return made


def matrix(title: str, description: str, unit: str, expr: str, row: str, column: str) -> Panel:
    """The values of now as a table of rows and columns, coloured; both labels are numbers."""
    made = panel(title, description, unit, {"": expr}, kind="table", width=WIDTH, height=14, cellHeight="sm")
    made["targets"][0] |= {"format": "table", "instant": True, "range": False}
    made["fieldConfig"]["defaults"] |= {
        "decimals": 0,
        "color": {"mode": "continuous-YlRd"},
        "custom": {"cellOptions": {"type": "color-background"}, "minWidth": 44, "align": "center"},
    }
    corner = f"{row}\\{column}"
    plain = [{"id": "custom.cellOptions", "value": {"type": "auto"}}, {"id": "unit", "value": "none"}]
    made["fieldConfig"]["overrides"] = [{"matcher": {"id": "byName", "options": corner}, "properties": plain}]
    numbers = [{"targetField": label, "destinationType": "number"} for label in (row, column)]
    made["transformations"] = [
        {"id": "convertFieldType", "options": {"conversions": numbers}},
        {"id": "sortBy", "options": {"sort": [{"field": column}]}},
        {
            "id": "groupingToMatrix",
            "options": {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "zero"},
        },
        {"id": "sortBy", "options": {"sort": [{"field": corner}]}},
    ]
    return made


def rate(metric: str, matchers: str = "") -> str:
    return f'rate({metric}{{job=~"$job"{matchers}}}[$__rate_interval])'


def per_second(metric: str, by: str = "") -> str:
    return f"sum by ({by}) ({rate(metric)})" if by else f"sum ({rate(metric)})"


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"p{round(q * 100)}{legend}": f"histogram_quantile({q}, sum by ({labels}) ({rate(metric + '_bucket')}))"
        for q in (0.5, 0.99)
    }


def mean(metric: str, by: str) -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"{per_second(metric + '_sum', by)} / {per_second(metric + '_count', by)}"}


OVERVIEW = [
    stat("Requests", "Accepted and not yet ended. Above zero without load: a leak.", "none",
         f"sum (moecluster_requests_running{ONE})"),
    stat("Tokens a second", "Sent to clients.", "short", per_second("moecluster_generated_tokens_total")),
    stat("Expert shards missing", "Wanted and not up. Runbook: MoeClusterShardsMissing.", "none",
         f"max (moecluster_controller_wanted_shards{ONE}) - max (moecluster_controller_up_shards{ONE})", red_from=1),
    stat("Experts without a copy", "Requests wait for them. Runbook: MoeClusterExpertWithoutCopy.", "none",
         'sum (moecluster_controller_experts{job=~"$job", copies="0"})', red_from=1),
    stat("Imbalance", "The slowest shard's load over the mean. Above 1.2 for long: rebalance.", "none",
         f"max (moecluster_controller_imbalance{ONE})", red_from=1.2),
    stat("Alerts", "That fire now, of this cluster.", "none",
         'sum (ALERTS{alertstate="firing", alertname=~"MoeCluster.*", job=~"$job"}) or vector(0)', red_from=1),
    panel("Requests by outcome", "How requests end. resource_exhausted asks for attention replicas; unavailable and "
          "internal are faults of ours.", "reqps", {"{{outcome}}": per_second("moecluster_requests_total", "outcome")}),
    panel("Running requests", "Compare with max_ongoing_requests.", "none",
          {"requests": f"sum (moecluster_requests_running{ONE})"}),
    panel("Throughput", "A fall of generated tokens while requests run is a fault.", "short",
          {"generated tokens/s": per_second("moecluster_generated_tokens_total"),
           "prompt tokens/s": per_second("moecluster_prompt_tokens_total"),
           "{{method}} results/s": per_second("moecluster_results_total", "method")}),
    panel("Time to first token", "Grows with the queue (dashboard latency) or with longer prompts.", "s",
          quantiles("moecluster_time_to_first_token_seconds")),
    panel("Between tokens", "What readers feel. Grows: look at the step, the round trip, the shards.", "s",
          quantiles("moecluster_inter_token_latency_seconds")),
    panel("Request duration", "From arrival to the last token, of requests that were answered.", "s",
          quantiles("moecluster_request_duration_seconds")),
    panel("Expert shards", "Up below wanted: the controller makes the missing ones again.", "none",
          {"up": f"max (moecluster_controller_up_shards{ONE})",
           "wanted": f"max (moecluster_controller_wanted_shards{ONE})",
           "on nodes that leave": f"max (moecluster_controller_leaving_shards{ONE})"}),
    panel("Plan epoch", "A replica that stays behind the controller while it has rows does not hear of plans.", "none",
          {"controller": f"max (moecluster_controller_plan_epoch{ONE})",
           "{{replica}}": f"max by (replica) (moecluster_dispatch_plan_epoch{ONE})"}),
    panel("Survived faults", "Requests that went on at another replica, shards made again. Growing without deploys: "
          "look for what dies.", "none",
          {"replays": f"sum (increase(moecluster_request_replays_total{ONE}[$__rate_interval]))",
           "respawns of shard {{shard_id}}":
           f"sum by (shard_id) (increase(moecluster_controller_respawns_total{ONE}[$__rate_interval]))"}),
    panel("Processes by version", "Two versions for longer than a rollout takes: `moe-cluster roll` is still to come.",
          "none", {"{{role}} {{version}}": f"sum by (role, version) (moecluster_build_info{ONE})"}),
]  # fmt: skip

EXPERTS = [
    matrix("Tokens a second, layers by experts", "Where the load is, all copies of an expert together. A few hot "
           "cells in a line are what rebalancing and redundant_experts spread.", "none",
           per_second("moecluster_expert_tokens_total", "layer_id, expert_id"), "layer_id", "expert_id"),
    panel("Imbalance", "The slowest shard's load over the mean; 1 is even. Above 1.2 for long: moe-cluster rebalance.",
          "none", {"imbalance": f"max (moecluster_controller_imbalance{ONE})"}),
    panel("Experts by loaded copies", "All layers together. With 0 requests wait; with 1 the next death of a shard "
          "makes them wait.", "none", {"{{copies}} copies": f"sum by (copies) (moecluster_controller_experts{ONE})"}),
    panel("Changes of placement", "By kind and outcome. Failed: read the controller's log.", "none",
          {"{{kind}} {{outcome}}":
           f"sum by (kind, outcome) (increase(moecluster_controller_changes_total{ONE}[$__rate_interval]))",
           "experts moved": f"sum (increase(moecluster_controller_moved_experts_total{ONE}[$__rate_interval]))"}),
    panel("Rows computed", "By shard. One far above the others holds too many busy experts.", "rowsps",
          {"shard {{shard_id}}": per_second("moecluster_shard_rows_total", "shard_id")}),
    panel("Time that a shard computes", "Share of the time. Near 100 %: more shards.", "percentunit",
          {"shard {{shard_id}}": per_second("moecluster_shard_compute_seconds_sum", "shard_id")}),
    panel("One grouped product", "Mean of a shard. Longer than the others' with as many rows: a slow node.", "s",
          mean("moecluster_shard_compute_seconds", "shard_id")),
    panel("Late batches", "Asked of another copy because this shard was late (hedged).", "ops",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_hedged_total", "shard_id")}),
    panel("Rows sent again", "Because this shard failed them.", "rowsps",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_rerouted_rows_total", "shard_id")}),
    panel("Batches over Ray calls", "Because the stream to this shard was down.", "ops",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_fallbacks_total", "shard_id")}),
]  # fmt: skip

LATENCY = [
    heatmap("Time to first token", "All requests. A second band is prompts of another length, or a queue.",
            "moecluster_time_to_first_token_seconds"),
    heatmap("Between tokens", "All tokens. A band far above the rest is stalls: prefills, lost shards.",
            "moecluster_inter_token_latency_seconds"),
    panel("Queue wait", "From a sequence's arrival to its first step: what more attention replicas take away.", "s",
          quantiles("moecluster_engine_queue_wait_seconds", "replica")),
    panel("Engine step", "Bounds the time between tokens.", "s",
          quantiles("moecluster_engine_step_seconds", "replica")),
    panel("Request duration", "From arrival to the last token.", "s", quantiles("moecluster_request_duration_seconds")),
    panel("Dispatch round trip", "One layer's rows to a shard and back. Less compute and queue wait: the carrier.", "s",
          quantiles("moecluster_dispatch_round_trip_seconds", "shard_id")),
    panel("Shard compute", "One grouped product.", "s", quantiles("moecluster_shard_compute_seconds", "shard_id")),
    panel("Shard queue wait", "Above the compute time: the shard is the bottleneck.", "s",
          quantiles("moecluster_shard_queue_wait_seconds", "shard_id")),
]  # fmt: skip

CAPACITY = [
    panel("Running sequences", "At max_num_seqs the batch is full.", "none",
          {"{{replica}}": f"sum by (replica) (moecluster_engine_running_sequences{ONE})"}),
    panel("Waiting sequences", "Above zero for minutes: add attention replicas.", "none",
          {"{{replica}}": f"sum by (replica) (moecluster_engine_waiting_sequences{ONE})"}),
    panel("Held sequences", "They wait for an expert without a living copy: look for the shard that does not come up.",
          "none", {"{{replica}}": f"sum by (replica) (moecluster_engine_held_sequences{ONE})"}),
    panel("KV cache in use", "Near 100 % with preemptions: raise kv_cache_bytes or lower max_num_seqs.", "percentunit",
          {"{{replica}}": f"sum by (replica) (moecluster_engine_kv_used_blocks{ONE}) "
           f"/ sum by (replica) (moecluster_engine_kv_capacity_blocks{ONE})"}),
    panel("Batch of a step", "Mean sequences. Small while sequences wait: the token budget or the blocks hold it back.",
          "none", mean("moecluster_engine_step_sequences", "replica")),
    panel("Tokens a second of a replica", "By phase. Prefill above the prompts' rate is work done twice.", "short",
          {"{{replica}} {{phase}}": per_second("moecluster_engine_step_tokens_total", "replica, phase")}),
    panel("Preemptions", "Sequences thrown out of the KV cache to be computed again.", "ops",
          {"{{replica}}": per_second("moecluster_engine_preemptions_total", "replica")}),
    panel("Prompt tokens from the cache", "Share that prefix caching saved.", "percentunit",
          {"share": f"{per_second('moecluster_engine_reused_tokens_total')} / "
           f"{per_second('moecluster_prompt_tokens_total')}"}),
    panel("Beginnings of prompts", "Requests: hit, their replica has it; busy, those that have it had too many; "
          "new, none has it.", "reqps", {"{{outcome}}": per_second("moecluster_balanced_requests_total", "outcome")}),
    panel("Guessed tokens that were right", "Of those that steps tried. Low: the text seldom repeats itself, or the "
          "draft model is far from the model.", "percentunit",
          {"{{replica}}": f"{per_second('moecluster_engine_accepted_tokens_total', 'replica')} / "
           f"{per_second('moecluster_engine_drafted_tokens_total', 'replica')}"}),
    panel("Sequences that ended", "By reason. Many cancelled: clients gave up waiting.", "ops",
          {"{{reason}}": per_second("moecluster_engine_finished_sequences_total", "reason")}),
    panel("Expert weights", "Of each shard. Keep it below its memory with room for batches.", "bytes",
          {"shard {{shard_id}}": f"sum by (shard_id) (moecluster_shard_weights_bytes{ONE})"}),
    panel("To the shards", "Payload. Compare with what the network carries.", "Bps",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_sent_bytes_total", "shard_id")}),
    panel("From the shards", "Payload. Compare with what the network carries.", "Bps",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_received_bytes_total", "shard_id")}),
    panel("Rows to the shards", "A row is one token at one layer. Uneven: rebalance.", "rowsps",
          {"shard {{shard_id}}": per_second("moecluster_dispatch_rows_total", "shard_id")}),
    panel("Kept responses", "Of /v1/responses. At stored_responses the oldest go.", "none",
          {"kept": f"max (moecluster_responses_kept{ONE})", "running": f"max (moecluster_responses_running{ONE})"}),
    panel("Memory of kept responses", "At stored_responses_bytes the oldest go.", "bytes",
          {"kept": f"max (moecluster_responses_kept_bytes{ONE})"}),
    panel("Evicted responses", "By reason. Many for room: raise stored_responses or stored_responses_bytes.", "ops",
          {"{{reason}}": per_second("moecluster_responses_evicted_total", "reason")}),
]  # fmt: skip


def dashboard(name: str, panels: list[Panel]) -> dict[str, Any]:
    """Places the panels from left to right, line by line. The uid is the name's, so that links stay."""
    x = y = line = 0
    for number, each in enumerate(panels, 1):
        place = each["gridPos"]
        if x + place["w"] > WIDTH:
            x, y, line = 0, y + line, 0
        each["id"], place["x"], place["y"] = number, x, y
        x, line = x + place["w"], max(line, place["h"])
    job = {"name": "job", "label": "cluster", "type": "query", "datasource": DATASOURCE, "refresh": 2,
           "query": "label_values(moecluster_requests_running, job)", "includeAll": True, "allValue": ".*",
           "current": {"text": "All", "value": "$__all"}}  # fmt: skip
    return {
        "uid": f"moe-cluster-{name}",
        "title": f"moe-cluster: {name}",
        "tags": ["moe-cluster"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["moe-cluster"], "title": "moe-cluster", "keepTime": True,
                   "includeVars": True}],
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, job]},
        "panels": panels,
    }  # fmt: skip


def dashboards() -> dict[str, str]:
    """File names and what stands in them."""
    parts = {"overview": OVERVIEW, "experts": EXPERTS, "latency": LATENCY, "capacity": CAPACITY}
    return {
        f"{name}.json": json.dumps(dashboard(name, panels), indent=1, ensure_ascii=False) + "\n"
        for name, panels in parts.items()
    }


if __name__ == "__main__":
    for name, text in dashboards().items():
        (HERE / name).write_text(text)
