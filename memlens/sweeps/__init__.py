"""Change many things, exactly and fast: interventions, metrics at target positions, the engine."""
