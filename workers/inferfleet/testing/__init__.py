"""Fakes that ship: a clock that moves when told, a memory broker, a puppet model, builders."""
