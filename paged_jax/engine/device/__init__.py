"""Pure functions of arrays: what runs on the device in one call of the engine."""
