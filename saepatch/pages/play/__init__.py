"""`saepatch play`: a page on which one tries latents out, and the server that answers it on this machine.

Visitors' questions are answered by one model, one after another (`queue`), by the library's own functions (`desk`);
every answer says the command and the Python that give it (`exports`).

May import the rooms below pages.
"""
