"""A Ray cluster of two small nodes on this machine, for test_parallel.py; it ends when its standard input does."""

import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    print(cluster.address, flush=True)  # noqa: T201 - the test reads it
    sys.stdin.read()
    cluster.shutdown()
