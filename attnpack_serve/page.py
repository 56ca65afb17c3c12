def page():
    return b"<!doctype html><title>attnpack</title>", {}
