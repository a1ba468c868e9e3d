"""The first two answers get lost on their way; the SDK asks three times, under
one key that it has made itself."""

import os

from service import Case, client


class LostAnswers(Case):
    def test_one_charge(self):
        lossy = client(os.environ["LOSSY_URL"], retries=2)
        charge = lossy.v1.charges.create(
            params={"amount": 5000, "currency": "usd", "customer": self.customer}
        )
        # What it has got is the answer to its first try.
        self.assertEqual(charge.last_response.headers["Idempotent-Replayed"], "true")
        found = self.charges.list(params={"customer": self.customer})
        self.assertEqual([c.to_dict() for c in found], [charge.to_dict()])
