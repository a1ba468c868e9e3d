"""The service under test, and what every case asks of its errors."""

import json
import os
import unittest

import stripe

API_KEY = os.environ["PAYONCE_API_KEY"]
URL = os.environ["PAYONCE_URL"]


def client(url=URL, api_key=API_KEY, retries=2):
    """As its users make one; without max_network_retries it asks once."""
    return stripe.StripeClient(
        api_key, base_addresses={"api": url}, max_network_retries=retries
    )


class Case(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.charges = client().v1.charges
        self.refunds = client().v1.refunds
        # Cases share an account, so each has a customer of its own.
        self.customer = "cus_" + self.id().rsplit(".", 1)[-1]

    def charge(self, **params):
        params = {
            "amount": 5000,
            "currency": "usd",
            "customer": self.customer,
            "source": "tok_visa",
            **params,
        }
        return self.charges.create(params=params)

    def fails(self, kind, status, code, call, *args, **options):
        """Makes a call that has to fail so, and gives back its error, which
        says the same in both dialects: the SDK's, and RFC 9457's."""
        with self.assertRaises(kind) as caught:
            call(*args, **options)
        e = caught.exception
        # Not a class that only inherits from it.
        self.assertIs(type(e), kind)
        self.assertEqual(e.http_status, status)
        self.assertEqual(e.error.code, code)
        self.assertTrue(e.user_message)
        self.assertTrue(e.request_id.startswith("req_"))

        self.assertEqual(e.headers["Content-Type"], "application/problem+json")
        problem = json.loads(e.http_body)
        self.assertEqual(problem, e.json_body)
        self.assertEqual(problem["type"], f"/errors/{code}")
        self.assertEqual(problem["status"], status)
        self.assertTrue(problem["title"])
        self.assertEqual(problem["detail"], e.user_message)
        self.assertEqual(problem["instance"], e.request_id)
        return e
