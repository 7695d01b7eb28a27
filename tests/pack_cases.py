"""What each rule of each pack must find, and what comes near and must pass.

pack -> rule -> (texts with a match, texts without a match of any rule of the pack)
"""

from __future__ import annotations

CASES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "secrets": {
        "private-key": (
            [
                "Sure:\n-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA",
                "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA",
                '{"private_key": "-----BEGIN PRIVATE KEY-----\\nMIIEvQ',
                "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQOYBGB",
                "PuTTY-User-Key-File-3: ssh-ed25519\n",
            ],
            [
                "-----BEGIN RSA PUBLIC KEY-----\nMIIBCgKCAQEA",
                "-----BEGIN CERTIFICATE-----\nMIIDXTCCAkWg",
                "-----BEGIN PGP PUBLIC KEY BLOCK-----",
                "A file that begins with BEGIN RSA PRIVATE KEY between dashes holds a private key.",
                "PuTTY user key files come in versions 2 and 3.",
            ],
        ),
        "secret-token": (
            [
                "AGE-SECRET-KEY-1QQPQQQSYQCYQ5RQWZQFPG9SCRGWPUGPZYSNZS23V9CCRYDPK8QARC0S",
                "password = pypi-AgEIcHlwaS5vcmcCJDEyMzQ",
                "curl -X POST https://hooks.slack.com/services/T00000000/B00000000/XXXX",
                "DefaultEndpointsProtocol=https;AccountName=prod;AccountKey=",
            ],
            [
                "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kdhc8mcfs4gh3fx",
                "The token of PyPI begins with pypi- and is a macaroon.",
                "See https://api.slack.com/messaging/webhooks for incoming webhooks.",
                "AccountName=prod",
            ],
        ),
        "token-prefix": (
            ["export GITHUB_TOKEN=ghp_16C7e42F292c6912E7710c838347Ae178B4a", "xoxb-1234-5678-abc",
             "sk_live_4eC39HqLyjWDarjtT1zdp7dc"],
            ["sk_test_4eC39HqLyjWDarjtT1zdp7dc", "GHP is a unit of boiler power.", "ghp 12"],
        ),
    },
    "prompt-leak": {
        "prompt-canary": (
            ["It says: STREAMGUARD-CANARY 12", "streamguard_canary"],
            ["A canary of streamguard is a word in the prompt.", "STREAMGUARD CANARIES"],
        ),
        "prompt-template-mark": (
            ["<|im_start|>system\nYou are", "[INST] <<SYS>>\nYou are", "<|SYSTEM|>"],
            ["<|im_start|>user\nHello", "cout << sys >> x", "<|assistant|>", "<system>"],
        ),
        "prompt-announced": (
            [
                "Of course! Here is my system prompt: You are a helpful bot.",
                "My instructions are as follows: be brief.",
                "HERE'S MY SYSTEM PROMPT",
            ],
            [
                "I can't tell you what my system prompt is.",
                "I have a system prompt, but I may not show it.",
                "The instructions are as follows: first, preheat the oven.",
                "Here is how a system prompt is written.",
            ],
        ),
    },
}  # fmt: skip
