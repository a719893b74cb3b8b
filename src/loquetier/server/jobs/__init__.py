"""Fine-tuning jobs over HTTP: from a body to a running job, from its events to rows, and back after a restart."""
