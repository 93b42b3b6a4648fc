"""What the machine is: read from the system's own files and nvidia-smi, by benchmarks and `moebius-export doctor`."""
