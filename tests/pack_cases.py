"""What each rule of each pack must find, and what comes near and must pass.

pack -> rule -> (texts with a match, texts without a match of any rule of the pack)

Everything is made up: keys are put together from a prefix and filling, card numbers and IBANs are
those of test systems, addresses and domains those set aside for documentation.
"""

from __future__ import annotations


def key(prefix: str, length: int, filling: str = "Ab3Cd5Ef7Gh9") -> str:
    """A prefix and so many characters after it."""
    return prefix + (filling * length)[:length]


def jwt(header: str, body: int, signature: int) -> str:
    return key(header, 17) + "." + key("eyJ", body) + "." + key("", signature)


PROSE = """\
The Battle of Hastings was fought on 14 October 1066, and the census of 1801 counted 10,501,000
people. Python 3.12.4 came after 3.12.3; the server runs version 2.14.1.0, and Chrome 120.0.6099.109
is old. On 2024-01-15 at 12:30:45 (or 15.01.2024, 01/15/2024, 01-15-2024) the job 4711 took 1 h 30
min. Set host to 127.0.0.1, 0.0.0.0, 10.0.0.1 or 192.168.178.20 with netmask 255.255.255.0, port 5432;
the MAC address is 00:1B:44:11:3A:B7, the link-local one fe80::1, and std::vector<int> is a type.

Your order number is 12345678901, the tracking number 1Z999AA10123456784, the invoice 2024-000123.
The timestamp 1712345678901 is in milliseconds, 1712345678901234 in microseconds. Pi is 3.14159265358979
and the speed of light 299 792 458 m/s. The UUID is 550e8400-e29b-41d4-a716-446655440000, the hash
d41d8cd98f00b204e9800998ecf8427e; ISBN 978-3-16-148410-0, EAN 4006381333931, RFC 2616, ISO 9001:2015.

An API key belongs in the environment: export API_KEY=... and never in code. Tokens of GitHub begin
with ghp_, those of OpenAI with sk-, access keys with AKIA; use <YOUR_TOKEN> as a placeholder. Connect to
postgres://localhost:5432/app or redis://cache:6379/0. Reset your password: it must have 8 characters.
pip install numpy==1.26.4, npm install react@18.2.0, ssh root@server, docker pull nginx:1.25@sha256.
Risk-averse, task-oriented desk-internationalization people write sk-learn and disk-encryption_tools.

Mix 200 g of flour, 4 eggs and 2.5 dl of milk; bake 20-25 minutes at 180 degrees. The AB12 CD34 road,
flight LH 1234, room 020 and the score 21-19-21 are only numbers. Call extension 4321, or see pages
100-200-300. In 1999, 2000, 2001 and 2002 sales were 4000, 4100, 4200 and 4300 units. Größe 42, naïve.
"""

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
                "curl -X POST https://hooks.slack.com/services/T00000000/B00000000/XXXX",
                "DefaultEndpointsProtocol=https;AccountName=prod;AccountKey=",
            ],
            [
                "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kdhc8mcfs4gh3fx",
                "See https://api.slack.com/messaging/webhooks for incoming webhooks.",
                "AccountName=prod",
            ],
        ),
        "aws-key": (
            [key("AK" "IA", 16, "Q2W3E4R5"), "id=" + key("AS" "IA", 16, "TEST7"),
             key("aws_secret_access_key = ", 40), key('"SecretAccessKey": "', 40, "a/B+9")],
            [key("AK" "IA", 11, "Q2W3"), "AKIA is the prefix of access key ids.",
             key("XAK" "IA", 16, "Q2W3"), "aws_secret_access_key = <your key>",
             key("akia", 16, "q2w3"), "AWS_SECRET_ACCESS_KEY=changeme"],
        ),
        "github-token": (
            [*(key(f"gh{kind}_", 36) for kind in "opsur"), key("export GITHUB_TOKEN=gh" "p_", 36),
             key("github" "_pat_", 22) + "_" + key("", 59)],
            ["ghp_ begins a token.", key("gh" "p_", 19), key("ghx_", 36), "ghp_your_token_goes_here",
             "github_pat_<token>", key("github" "_pat_", 20), "GHP is a unit of boiler power."],
        ),
        "gitlab-token": (
            [key("gl" "pat-", 20), key("token: gl" "dt-", 20, "x_Y9"), key("gl" "rt-", 20)],
            ["glpat-", key("gl" "pat-", 15), key("glxat-", 20), "glpat-<your token>"],
        ),
        "slack-token": (
            ["xox" "b-123456789012-1234567890123-" + key("", 24), "xox" "p-1234567890-" + key("", 20),
             "xox" "e.xoxp-1-" + key("", 40), "xapp" "-1-A0123456789-1234567890123-" + key("", 64, "a9")],
            ["xoxb-your-token", "xoxb-1234-5678-abc", "xoxo-1234567890-hugs-and-kisses",
             "xapp-1-A012-123-short", "xoxb-123456789012-short"],
        ),
        "google-key": (
            [key("AI" "za", 35), key("?key=AI" "za", 35, "Q_w-9"), key("ya" "29.", 60, "a0_B-"),
             key("GOC" "SPX-", 28)],
            [key("AI" "za", 19), key("AIzb", 35), "ya29.short", "GOCSPX-example", key("xAI" "za", 35)],
        ),
        "stripe-key": (
            [key("sk" "_live_", 24), key("rk" "_live_", 24), key("wh" "sec_", 32),
             key("STRIPE_KEY=sk" "_live_", 99)],
            [key("sk_test_", 24), key("pk_live_", 24), "sk_live_...", key("sk" "_live_", 11),
             "whsec_<secret>"],
        ),
        "model-api-key": (
            [key("sk" "-", 48), key("sk" "-proj-", 60, "a_B-9"), key("OPENAI_API_KEY=sk" "-svcacct-", 60),
             key("sk" "-ant-api03-", 90, "a_B-9"), key("sk" "-or-v1-", 64, "0a9f"),
             key("gs" "k_", 52), key("'hf" "_", 34) + "'"],
            ["sk-learn", "sk-proj-your-key", "sk-ant-api03-...", "desk-internationalization",
             key("task-", 48), key("hf_", 25), "hf_hub_download_and_load_the_model_now",
             key("gsk_", 20), key("sk" "-", 23)],
        ),
        "registry-token": (
            [key("np" "m_", 36), "password = pypi" "-AgEIcHlwaS5vcmc" + key("", 100),
             key("pypi" "-AgENdGVzdC5weXBpLm9yZw", 100), key("dc" "kr_pat_", 27)],
            ["npm_config_registry=https://registry.example", key("npm_", 23), "npm_package_name",
             "The token of PyPI begins with pypi-AgEI and is a macaroon.", "dckr_pat_<token>"],
        ),
        "service-token": (
            [key("S" "G.", 22) + "." + key("", 43), "https://api.telegram.org/bot123456789:AA" + key("", 33),
             key("do" "p_v1_", 64, "0a9f"), key("hv" "s.", 90)],
            ["SG.example.com", key("SG.", 22) + ".short", "12345678:AA batteries", key("dop_v1_", 20, "0a9f"),
             "hvs.<token>", key("hvs.", 23)],
        ),
        "json-web-token": (
            [jwt("eyJ", 40, 43), "Authorization: Bearer " + jwt("eyJ", 300, 342),
             '{"token": "' + jwt("eyJ", 12, 43) + '"}'],
            [key("eyJ", 300), jwt("eyJ", 40, 15), jwt("eyK", 40, 43), "eyJhbGciOiJIUzI1NiJ9 is a header.",
             "eyJ....eyJ....sig"],
        ),
        "connection-string": (
            ["postgres://app:hunter2@db.example.com/app", "mysql://root:123456789@127.0.0.1:3306",
             "mongodb+srv://u:p4ss@cluster0.example.net", "redis://:secret@cache.example:6379/0",
             "AMQP://guest:guest@localhost", "postgresql+psycopg2://me:9lives@localhost/x"],
            ["postgres://localhost:5432/app", "redis://cache:6379", "mysql://user@localhost:3306/db",
             "postgres://user:<password>@host/db", "postgres://user:${PASSWORD}@host",
             "mongodb://user:****@host", "https://example.com:8443/path", "amqp://rabbit:5672, then"],
        ),
        "azure-account-key": (
            [key("AccountName=prod;Account" "Key=", 86, "a9/B+") + "==", key("account" "key=", 88),
             key("Shared" "AccessKey=", 43) + "="],
            ["AccountKey=<key>", key("AccountKey=", 19), "AccountKey=;", "SharedAccessKeyName=Root"],
        ),
        "assigned-password": (
            ['password = "' + key("", 12) + '"', "api_key: '" + key("", 20) + "'",
             '{"client_secret": "' + key("", 16) + '"}'],
            ['password = "short"', "password = os.environ['PASSWORD_OF_DB']", 'password = "<password>"',
             'password = "${DB_PASSWORD}"', "Your password is at least 12 characters long."],
        ),
    },
    "pii": {
        "email-address": (
            ["alice@example.com", "Write to bob.smith+news@mail.example.co.uk.", "<a_b-c@example.org>",
             "mailto:x%y@example.net?subject=hi"],
            ["react@18.2.0", "ssh root@server", "user@192", "@alice.example", "a @ b.com", "@decorator.x",
             "alice at example dot com"],
        ),
        "phone-number": (
            ["+1 212 555 0123", "+49 (0)30 1234567", "+442079460958", "call +33 1 23 45 67 89",
             "(212) 555-0123", "212-555-0123", "1-800-555-0199", "212.555.0123", "01 23 45 67 89",
             "020 7946 0958", "0161 496 0123", "07700 900123", "030 1234567", "089/1234567", "01632 960 123"],
            ["2024-01-15", "01-02-2024", "15.01.2024", "+1,000,000,000", "+12345678", "1234567890",
             "100-200-300", "212-555-01234", "112-555-0123", "12 34 56 78 90",
             "0.123 456789", "3 + 4 5", "00:12:34"],
        ),
        "iban": (
            ["DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32",
             "FR14 2004 1010 0505 0001 3M02 606", "NO93 8601 1117 947", "ES9121000418450200051332",
             "IT60X0542811101000000123456", "CH93 0076 2011 6238 5295 7", "NL91ABNA0417164300",
             "SA03 8000 0000 6080 1016 7519"],
            ["DE89 3704 0044", "XX89 3704 0044 0532 0130 00", "de89 3704 0044 0532 0130 00",
             "GB82 1234 5698 76", "ADE89370400440532013000", "DE8 9370 4004 4053", "FR14 rue",
             "ES9121000418"],
        ),
        "iban-in-one-piece": (
            ["de89370400440532013000", "No9386011117947", "be68539007547034", "hr1210010051863000160",
             "RS35260005601001611379", "BA391290079401028494", "AE070331234567890123456",
             "tn5910006035183598478831", "pt50000201231234567890154", "pl61109010140000071219812874"],
            ["de89370400440532013001", "de98370400440532013000", "dk5000400440116244",
             "rs35260005601001611378", "xde89370400440532013000", "de893704004405320130000",
             "de89370400440532013000a",
             "be68539007547035", "fr1420041010050500013m02606", "de89370400440532013",
             "commit be68539007547034f00d", "9be68539007547034"],
        ),
        "payment-card": (
            ["4111 1111 1111 1111", "4111-1111-1111-1111", "5555 5555 5555 4444", "2223 0031 2200 3222",
             "3782 822463 10005", "6011 1111 1111 1117", "3056 930902 5904", "6200 0000 0000 0005",
             "4111 1111 1111 1112", "card no. 4242-4242 4242-4242, 12/34"],
            ["1111 1111 1111 1111", "4111 1111 1111", "4000, 4100", "9999 9999 9999 9999", "4111.1111",
             "7111-1111-1111-1111"],
        ),
        "payment-card-in-one-piece": (
            ["4111111111111111", "5105105105105100", "378282246310005", "30569309025904", "3530111333300000",
             "2223003122003222", "6200000000000005", "4222222222222", "4000000000000000006",
             "6304000000000000", "6759649826438453", "card no. 4242424242424242, 12/34"],
            ["4111111111111112", "5105105105105101", "4111111111111101", "378282246310006", "30569309025905",
             "4000000000000000", "order 4711471147114712", "6304000000000001", "4000000000000000007",
             "41111111111111112", "411111111111111", "2024010112304567", "378282246310", "1712345678901234",
             "0.4111111111111111", "94111111111111111", "4111111111111111e", "1111111111111117"],
        ),
        "ip-address": (
            ["192.0.2.17", "198.51.100.255", "Host: 203.0.113.9:8080", "[2001:db8::1]",
             "2001:db8:0:0:0:0:0:1",
             "2001:0db8:85a3:0000:0000:8a2e:0370:7334", "2001:DB8:1:2::abcd/64", "9.20.130.1"],
            ["1.2.3", "1.2.3.4", "3.12.4.1", "2.14.1.0", "127.0.0.1", "10.20.30.40", "192.168.1.1",
             "172.16.0.1", "172.31.9.9", "169.254.1.1", "255.255.255.0", "240.0.0.1", "256.100.100.100",
             "120.0.6099.109", "192.0.2", "1.3.6.1.4.1.311", "12:30:45", "00:1B:44:11:3A:B7", "fe80::1",
             "::1", "std::vector", "dead::beef", "2001:db8::/32", "2024:01:15 12:30:45", "10:20:30:40"],
        ),
        "us-ssn": (
            ["123-45-6789", "SSN: 219-09-9999.", "078-05-1120"],
            ["000-45-6789", "666-45-6789", "900-45-6789", "123-00-6789", "123-45-67", "123-456-789",
             "1123-45-6789", "2024-01-1234", "123 45 6789"],
        ),
        "uk-nino": (
            ["AB123456C", "AB 12 34 56 C", "His number is ce123456d.".replace("ce123456d", "CE123456D")],
            ["QQ123456C", "AB123456E", "AB12345C", "AB123456CD", "ab123456c", "AB1234567"],
        ),
        "de-tax-id": (
            ["Steuer-ID: 12 345 678 901", "Steueridentifikationsnummer 12345678901", "IdNr. 12345678901",
             "Die Steuer-ID ist 12345678901"],
            ["12 345 678 901", "12345678901", "Steuer-ID: 02 345 678 901", "Steuer-ID: folgt",
             "Die Steuer-ID hat 11 Ziffern."],
        ),
        "es-dni": (
            ["12345678Z", "DNI 12345678-Z,", "X1234567L", "Y-1234567-X"],
            ["1234567Z", "12345678I", "12345678Zx",
             "0.12345678E-7", "123456789Z", "X123456L", "12345678 apples", "W1234567L"],
        ),
        "fr-nir": (
            ["1 85 05 78 006 084 36", "2 69 05 49 588 157 80", "185057800608436", "1 99 12 2A 001 123"],
            ["1 85 13 78 006 084", "3 85 05 78 006 084 36", "1712345678901", "1850578006084361", "1 85 05"],
        ),
        "it-codice-fiscale": (
            ["RSSMRA85T10A562S", "MRTMTT91D08F205J", "c.f. VRDGPP13R10B293P"],
            ["RSSMRA85F10A562S", "RSSMR85T10A562S", "rssmra85t10a562s", "RSSMRA8510A562S", "ABCDEF12"],
        ),
        "br-cpf": (
            ["123.456.789-09", "CPF: 111.444.777-35", "(529.982.247-25)"],
            ["123.456.789", "123.456.789,09", "v123.456.789-0", "123-456-789-09", "12.345.678-9"],
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
