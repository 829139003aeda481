"""One table over the processes of a torch.distributed group."""
