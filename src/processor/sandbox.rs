//! The sandbox: decides by the charge's `source` alone, at once and without
//! side effects, as Stripe's test tokens do.
//!
//! Source: *Testing*, "Declined payments", in Stripe's documentation. Where
//! that table says `n/a`, there is no decline code.

use super::{Decline, Outcome};

/// Tokens that succeed. A charge without a source succeeds too.
const APPROVED: &[&str] = &[
    "tok_visa",
    "tok_visa_debit",
    "tok_mastercard",
    "tok_mastercard_debit",
    "tok_mastercard_prepaid",
    "tok_amex",
    "tok_discover",
    "tok_diners",
    "tok_jcb",
    "tok_unionpay",
];

/// Tokens that decline: the rest of the name, code, decline code, message.
/// Each is known as `tok_…` and as `tok_visa_…`: Stripe renamed some of them.
const DECLINED: &[(&str, &str, Option<&str>, &str)] = &[
    (
        "chargeDeclined",
        "card_declined",
        Some("generic_decline"),
        "Your card was declined.",
    ),
    (
        "chargeDeclinedInsufficientFunds",
        "card_declined",
        Some("insufficient_funds"),
        "Your card has insufficient funds.",
    ),
    (
        "chargeDeclinedLostCard",
        "card_declined",
        Some("lost_card"),
        "Your card was declined.",
    ),
    (
        "chargeDeclinedStolenCard",
        "card_declined",
        Some("stolen_card"),
        "Your card was declined.",
    ),
    (
        "chargeDeclinedFraudulent",
        "card_declined",
        Some("fraudulent"),
        "Your card was declined.",
    ),
    (
        "chargeDeclinedVelocityLimitExceeded",
        "card_declined",
        Some("card_velocity_exceeded"),
        "Your card was declined for making repeated attempts too frequently or exceeding its amount limit.",
    ),
    (
        "chargeDeclinedExpiredCard",
        "expired_card",
        None,
        "Your card has expired.",
    ),
    (
        "chargeDeclinedIncorrectCvc",
        "incorrect_cvc",
        None,
        "Your card's security code is incorrect.",
    ),
    (
        "chargeDeclinedProcessingError",
        "processing_error",
        None,
        "An error occurred while processing your card. Try again in a little bit.",
    ),
];

/// What becomes of a charge to `source`; `None` if there is no such test token,
/// which is the client's mistake and not a decline.
#[must_use]
pub fn decide(source: Option<&str>) -> Option<Outcome> {
    let Some(source) = source else {
        return Some(Outcome::Approved);
    };
    if APPROVED.contains(&source) {
        return Some(Outcome::Approved);
    }
    let name = source.strip_prefix("tok_")?;
    let name = name.strip_prefix("visa_").unwrap_or(name);
    DECLINED
        .iter()
        .find(|row| row.0 == name)
        .map(|row| Outcome::Declined(decline(row)))
}

fn decline(&(_, code, decline_code, message): &(&str, &str, Option<&str>, &str)) -> Decline {
    Decline {
        code: code.to_owned(),
        decline_code: decline_code.map(str::to_owned),
        message: message.to_owned(),
    }
}

/// Every way in which the sandbox declines.
pub fn declines() -> impl Iterator<Item = Decline> {
    DECLINED.iter().map(decline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_decides() {
        assert_eq!(decide(None), Some(Outcome::Approved));
        assert_eq!(decide(Some("tok_visa")), Some(Outcome::Approved));
        let Some(Outcome::Declined(decline)) = decide(Some("tok_chargeDeclinedInsufficientFunds"))
        else {
            panic!("it was not declined");
        };
        assert_eq!(decline.code, "card_declined");
        assert_eq!(decline.decline_code.as_deref(), Some("insufficient_funds"));
        assert_eq!(
            decide(Some("tok_visa_chargeDeclined")),
            decide(Some("tok_chargeDeclined"))
        );
        for unknown in [
            "",
            "tok_",
            "tok_visa_",
            "tok_nothing",
            "card_visa",
            "TOK_VISA",
        ] {
            assert_eq!(decide(Some(unknown)), None, "{unknown:?}");
        }
    }
}
