"""The command line as torchrun would start it, but through files and the loopback device only.

parallel_cli.py FOLDER ARGUMENTS..., with RANK and WORLD_SIZE in the environment.
"""

import os
import sys
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist

from diffattn.pipelines import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[1]}/rendezvous",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )
    # On a torch without accelerators diffusers 0.42 divides by their number, 0.
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        code = cli.run(sys.argv[2:])
    dist.destroy_process_group()
    sys.exit(code)
