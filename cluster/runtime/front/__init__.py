"""A node's front: HAProxy, the processes that keep it running, ingresses, and the replicas that these call."""
