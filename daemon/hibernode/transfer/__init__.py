"""The data plane: bytes and threads. No asyncio, no store library, no bus."""
