"""Self-supervised methods: losses, views and schedules."""
