"""The ground floor of every wing: reductions, sites, methods and their registry, schedules, matching and selection."""
