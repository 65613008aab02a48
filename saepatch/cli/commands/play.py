"""`saepatch play`."""

from saepatch.settings.play import PlayConfig


def play(config: PlayConfig) -> None:
    from saepatch.pages.play.server import check_installed, open_door, page_server

    check_installed()
    with open_door(config.port) as door:
        from saepatch.pages.play.desk import Desk

        server, address = page_server(Desk(config).questions, door)
        print(f"{address}\nThe page is for this machine alone; its address holds the key. Ctrl-C ends it.", flush=True)
        try:
            server.run(sockets=[door])
        except KeyboardInterrupt:  # how one ends it
            return
