"""A training of any number of ranks: the same command goes on after a kill, with as many ranks or others.

torchrun --nproc-per-node 4 train.py runs/gpt
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import everstep


def main(repo: str, epochs: int = 2) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(960, 32), torch.randn(960, 1))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    run = everstep.open(repo, model=model, optimizer=optimizer, data=loader, every="10 steps")
    while run.epoch < epochs:
        sampler.set_epoch(run.epoch)
        for inputs, targets in run.steps():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
