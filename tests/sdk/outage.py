"""PostgreSQL is away for longer than a request is worked for, and comes back."""

import stripe

from service import Case, client


class Outage(Case):
    def pay(self):
        # Without retries of its own, so that each answer is seen.
        return client(retries=0).v1.charges.create(
            params={"amount": 5000, "currency": "usd", "customer": "cus_outage"},
            options={"idempotency_key": "sdk_outage"},
        )


class During(Outage):
    def test_is_told_to_ask_again(self):
        e = self.fails(stripe.APIError, 503, "unavailable", self.pay)
        self.assertEqual(e.headers["Stripe-Should-Retry"], "true")
        self.assertEqual(e.json_body["retry"]["same_key"], True)


class After(Outage):
    def test_the_same_key_charges_once(self):
        charge, again = self.pay(), self.pay()
        self.assertEqual(charge.status, "succeeded")
        self.assertEqual(again.id, charge.id)
        found = self.charges.list(params={"customer": "cus_outage"})
        self.assertEqual([c.id for c in found], [charge.id])
