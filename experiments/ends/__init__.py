"""What embedding and head cost: their bytes on every rank, and the time that the others idle."""
