"""What the API can do, as the SDK asks for it and reads it."""

import time

import stripe

from service import API_KEY, URL, Case, client


class Charges(Case):
    def test_create_and_retrieve(self):
        before = int(time.time())
        charge = self.charge(
            amount=1234,
            currency="eur",
            description="Zwei Brötchen & 1 Kaffee",
            metadata={"order": "6735", "a key & signs": "ä=ö&ü"},
        )
        self.assertIsInstance(charge, stripe.Charge)
        self.assertTrue(charge.id.startswith("ch_"))
        self.assertEqual(charge.object, "charge")
        self.assertEqual(charge.amount, 1234)
        self.assertEqual(charge.amount_captured, 1234)
        self.assertEqual(charge.amount_refunded, 0)
        self.assertEqual(charge.currency, "eur")
        self.assertEqual(charge.customer, self.customer)
        self.assertEqual(charge.description, "Zwei Brötchen & 1 Kaffee")
        self.assertEqual(
            charge.metadata.to_dict(), {"order": "6735", "a key & signs": "ä=ö&ü"}
        )
        self.assertEqual(charge.outcome.type, "authorized")
        self.assertEqual(charge.status, "succeeded")
        self.assertIs(charge.paid, True)
        self.assertIs(charge.captured, True)
        self.assertIs(charge.refunded, False)
        self.assertIs(charge.livemode, False)
        self.assertIsNone(charge.failure_code)
        self.assertTrue(before - 1 <= charge.created <= time.time() + 1)

        again = self.charges.retrieve(charge.id)
        self.assertEqual(again.to_dict(), charge.to_dict())

    def test_decline(self):
        e = self.fails(
            stripe.CardError,
            402,
            "card_declined",
            self.charge,
            source="tok_chargeDeclinedInsufficientFunds",
        )
        self.assertEqual(e.code, "card_declined")
        self.assertEqual(e.error.type, "card_error")
        self.assertEqual(e.error.decline_code, "insufficient_funds")
        self.assertEqual(e.user_message, "Your card has insufficient funds.")

        failed = self.charges.retrieve(e.error.charge)
        self.assertEqual(failed.status, "failed")
        self.assertIs(failed.paid, False)
        self.assertEqual(failed.failure_code, "card_declined")
        self.assertEqual(failed.outcome.reason, "insufficient_funds")

    def test_update(self):
        charge = self.charge(metadata={"kept": "1", "removed": "2"})
        updated = self.charges.update(
            charge.id,
            params={
                "description": "new",
                "metadata": {"removed": "", "added": "3"},
            },
        )
        self.assertEqual(updated.id, charge.id)
        self.assertEqual(updated.description, "new")
        self.assertEqual(updated.metadata.to_dict(), {"kept": "1", "added": "3"})
        again = self.charges.retrieve(charge.id)
        self.assertEqual(again.to_dict(), updated.to_dict())

    def test_capture_of_a_part(self):
        charge = self.charge(capture=False)
        self.assertIs(charge.captured, False)
        self.assertEqual(charge.amount_captured, 0)
        captured = self.charges.capture(charge.id, params={"amount": 3000})
        self.assertIs(captured.captured, True)
        self.assertEqual(captured.amount, 5000)
        self.assertEqual(captured.amount_captured, 3000)

        self.fails(
            stripe.InvalidRequestError,
            400,
            "charge_already_captured",
            self.charges.capture,
            charge.id,
        )

    def test_capture_of_all(self):
        # A POST without any parameter.
        captured = self.charges.capture(self.charge(capture=False).id)
        self.assertEqual(captured.amount_captured, 5000)

    def test_two_operations_are_two_charges(self):
        # The SDK makes a key of its own for each.
        self.assertNotEqual(self.charge().id, self.charge().id)


class Lists(Case):
    def test_all_pages(self):
        made = [self.charge(amount=100 + i).id for i in range(8)]
        made.reverse()
        first = self.charges.list(params={"customer": self.customer, "limit": 3})
        self.assertIsInstance(first, stripe.ListObject)

        pages = [first]
        while pages[-1].has_more:
            pages.append(pages[-1].next_page())
        self.assertEqual([len(page) for page in pages], [3, 3, 2])
        self.assertEqual([charge.id for page in pages for charge in page], made)
        self.assertEqual([charge.id for charge in first.auto_paging_iter()], made)

    def test_all_pages_backwards(self):
        made = [self.charge().id for _ in range(8)]
        first = self.charges.list(
            params={"customer": self.customer, "limit": 3, "ending_before": made[0]}
        )
        # It goes through each page from its end: oldest first.
        self.assertEqual([c.id for c in first.auto_paging_iter()], made[1:])

    def test_full_last_page(self):
        made = [self.charge().id for _ in range(6)]
        page = self.charges.list(params={"customer": self.customer, "limit": 3})
        self.assertIs(page.has_more, True)
        page = page.next_page()
        self.assertEqual([charge.id for charge in page], made[2::-1])
        self.assertIs(page.has_more, False)
        self.assertTrue(page.next_page().is_empty)

    def test_by_customer_and_time(self):
        old = self.charge()
        while int(time.time()) <= old.created:
            time.sleep(0.05)
        new = self.charge()
        self.charge(customer=self.customer + "_other")

        def ids(**created):
            found = self.charges.list(
                params={"customer": self.customer, "created": created}
            )
            return [charge.id for charge in found]

        self.assertEqual(ids(gte=old.created), [new.id, old.id])
        self.assertEqual(ids(gt=old.created), [new.id])
        self.assertEqual(ids(gte=old.created, lt=new.created), [old.id])
        self.assertEqual(ids(lt=old.created), [])
        self.assertEqual(ids(lte=new.created), [new.id, old.id])

    def test_unknown_cursor(self):
        e = self.fails(
            stripe.InvalidRequestError,
            404,
            "resource_missing",
            self.charges.list,
            params={"starting_after": "ch_" + "0" * 32},
        )
        self.assertEqual(e.param, "starting_after")


class Refunds(Case):
    def refund(self, charge, **params):
        return self.refunds.create(params={"charge": charge.id, **params})

    def test_part_then_rest_then_nothing(self):
        charge = self.charge()
        part = self.refund(charge, amount=2000, reason="requested_by_customer")
        self.assertIsInstance(part, stripe.Refund)
        self.assertTrue(part.id.startswith("re_"))
        self.assertEqual(part.amount, 2000)
        self.assertEqual(part.currency, "usd")
        self.assertEqual(part.charge, charge.id)
        self.assertEqual(part.reason, "requested_by_customer")
        self.assertEqual(part.status, "succeeded")
        charge = self.charges.retrieve(charge.id)
        self.assertEqual(charge.amount_refunded, 2000)
        self.assertIs(charge.refunded, False)

        e = self.fails(
            stripe.InvalidRequestError,
            400,
            "amount_too_large",
            self.refund,
            charge,
            amount=3001,
        )
        self.assertEqual(e.code, "amount_too_large")
        self.assertEqual(e.param, "amount")

        rest = self.refund(charge)
        self.assertEqual(rest.amount, 3000)
        charge = self.charges.retrieve(charge.id)
        self.assertEqual(charge.amount_refunded, 5000)
        self.assertIs(charge.refunded, True)

        e = self.fails(
            stripe.InvalidRequestError,
            400,
            "charge_already_refunded",
            self.refund,
            charge,
        )
        self.assertEqual(e.code, "charge_already_refunded")

        again = self.refunds.retrieve(part.id)
        self.assertEqual(again.to_dict(), part.to_dict())

    def test_list_by_charge(self):
        charge, other = self.charge(), self.charge()
        self.refund(other)
        made = [self.refund(charge, amount=100 + i).id for i in range(7)]
        made.reverse()
        first = self.refunds.list(params={"charge": charge.id, "limit": 3})
        self.assertEqual([refund.id for refund in first.auto_paging_iter()], made)


class Keys(Case):
    def create(self, key, **params):
        return self.charges.create(
            params={"amount": 700, "currency": "usd", **params},
            options={"idempotency_key": key},
        )

    def test_replay(self):
        first = self.create("sdk_replay", customer=self.customer)
        again = self.create("sdk_replay", customer=self.customer)
        self.assertEqual(again.to_dict(), first.to_dict())
        self.assertEqual(again.last_response.body, first.last_response.body)
        # Header names do not mind their case.
        self.assertNotIn("Idempotent-Replayed", first.last_response.headers)
        self.assertEqual(again.last_response.headers["Idempotent-Replayed"], "true")
        self.assertEqual(
            len(self.charges.list(params={"customer": self.customer})), 1
        )

    def test_replay_of_a_decline(self):
        def declines():
            with self.assertRaises(stripe.CardError) as caught:
                self.create("sdk_decline", source="tok_chargeDeclined")
            return caught.exception

        first, again = declines(), declines()
        self.assertEqual(again.http_body, first.http_body)
        self.assertEqual(again.headers["Idempotent-Replayed"], "true")

    def test_replay_of_a_refund(self):
        charge = self.charge()

        def refund():
            return self.refunds.create(
                params={"charge": charge.id, "amount": 1000},
                options={"idempotency_key": "sdk_refund"},
            )

        self.assertEqual(refund().id, refund().id)
        self.assertEqual(self.charges.retrieve(charge.id).amount_refunded, 1000)

    def test_reuse(self):
        self.create("sdk_reuse")
        # 422 would be an APIError to the SDK.
        e = self.fails(
            stripe.IdempotencyError,
            400,
            "idempotency_key_reused",
            self.create,
            "sdk_reuse",
            amount=701,
        )
        self.assertEqual(e.json_body["differs"], ["amount"])


class Refusals(Case):
    def test_wrong_api_key(self):
        stranger = client(api_key=API_KEY[:-1] + ("a" if API_KEY[-1] != "a" else "b"))
        for call in [stranger.v1.charges.list, self.create_as(stranger)]:
            e = self.fails(stripe.AuthenticationError, 401, "api_key_invalid", call)
            self.assertEqual(e.error.type, "authentication_error")

    def create_as(self, stranger):
        params = {"amount": 5000, "currency": "usd"}
        return lambda: stranger.v1.charges.create(params=params)

    def test_unknown_ids(self):
        nothing = "0" * 32
        for call, id in [
            (self.charges.retrieve, "ch_" + nothing),
            (self.charges.retrieve, "ch_nothing"),
            (self.charges.capture, "ch_" + nothing),
            (self.charges.update, "ch_" + nothing),
            (self.refunds.retrieve, "re_" + nothing),
        ]:
            e = self.fails(
                stripe.InvalidRequestError, 404, "resource_missing", call, id
            )
            self.assertEqual(e.code, "resource_missing")

    def test_missing_parameter(self):
        e = self.fails(
            stripe.InvalidRequestError,
            400,
            "parameter_missing",
            self.charges.create,
            params={"amount": 5000},
        )
        self.assertEqual(e.param, "currency")

    def test_wrong_parameter(self):
        e = self.fails(
            stripe.InvalidRequestError,
            400,
            "parameter_invalid_integer",
            self.charge,
            amount="50.00",
        )
        self.assertEqual(e.param, "amount")


class Classic(Case):
    """The older way of using the SDK, by its classes."""

    def test_all_of_it(self):
        stripe.api_key, stripe.api_base = API_KEY, URL
        charge = stripe.Charge.create(
            amount=5000, currency="usd", customer=self.customer, capture=False
        )
        charge.capture(amount=4000)
        self.assertEqual(charge.amount_captured, 4000)
        stripe.Charge.modify(charge.id, metadata={"order": "6735"})
        refund = stripe.Refund.create(charge=charge.id, amount=1000)
        self.assertEqual(refund.charge, charge.id)
        charge.refresh()
        self.assertEqual(charge.amount_refunded, 1000)
        self.assertEqual(charge.metadata["order"], "6735")
        found = stripe.Charge.list(customer=self.customer).auto_paging_iter()
        self.assertEqual([c.id for c in found], [charge.id])
