"""One file a verb. The only place that names the stages, which it imports when a command runs."""
