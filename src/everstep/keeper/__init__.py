"""What works beside the trainer: it takes filled arenas and makes them durable. No torch.

It is a process of its own (`client`, `start`: the trainer's side; `service`, `work`: the keeper's;
`protocol`, `places`: what is between), or a thread of the trainer's (`thread`). Both do what `keeping` does.
"""
