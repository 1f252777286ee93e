"""Launchers, one module per kernel stem: check shapes, choose work sizes, append the launch to a plan."""
