"""The coordinator: routes, rollouts, reports, the lease, the HTTP API and its dashboard."""
