"""Training: `trainer.run(config, workdir)`."""
