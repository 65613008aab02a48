"""The schema of the graphs that Neuronpedia and circuit-tracer's viewer read."""

NODE = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float}
NODE |= {"is_target_logit": bool, "run_idx": int, "jsNodeId": str, "clerp": str, "influence": float | None}
NODE |= {"activation": float | None}


def check_graph(graph):
    """The viewer's schema: names and types, ids that are distinct, links between nodes that exist."""
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= graph["metadata"].keys()
    assert {"linkType", "pinnedIds", "clickedId", "supernodes", "sg_pos"} <= graph["qParams"].keys()
    for node in graph["nodes"]:
        for name, kind in NODE.items():
            assert isinstance(node[name], kind), (name, node[name])
        assert node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
        assert 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in graph["links"]:
        assert {link["source"], link["target"]} <= set(ids)
        assert isinstance(link["weight"], float)
