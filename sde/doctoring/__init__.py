"""What `python -m sde.doctor` finds out before a training run: facts about the machine, the data, the noise levels, the
network and its speed (one file each), rules that turn them into advice, and the text of it all."""
