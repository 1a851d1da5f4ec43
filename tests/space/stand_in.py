"""The smallest app that a visitor can sign in to, for the tests of the fixtures."""

import gradio as gr
from huggingface_hub import whoami


def who(token: gr.OAuthToken | None, profile: gr.OAuthProfile | None) -> str:
    """Say whose token the app was given."""
    if token is None or profile is None:
        return "nobody"
    return f"{profile.username} is {whoami(token.token)['name']}"


def wrong() -> None:
    """Fail in the browser, and ask for something elsewhere."""


with gr.Blocks(title="stand-in", analytics_enabled=False) as demo:
    gr.LoginButton()
    shown = gr.Textbox(label="Who")
    demo.load(who, outputs=shown)
    gr.Button("Break").click(
        wrong, js="() => { console.error('broken'); fetch('http://example.org/x').catch(() => null); }"
    )

if __name__ == "__main__":
    demo.launch(footer_links=[])
