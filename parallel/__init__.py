"""Process groups, packed rows and collectives: knows torch.distributed, no model."""
