"""What a program will cost on a TPU that is not here, read off what the TPU's compiler makes of it."""
