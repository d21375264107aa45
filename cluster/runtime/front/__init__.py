"""A node's front: HAProxy and the processes that keep it, ingresses, and the replicas that they call."""
