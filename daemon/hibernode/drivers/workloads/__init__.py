"""Workloads of every kind behind one port: processes and managed jobs here; containers and pods join them."""
