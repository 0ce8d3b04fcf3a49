"""Starts training scripts on clusters: SLURM, Kubernetes on GKE, TPU VMs; see README.md."""
