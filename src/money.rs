//! Amounts that cannot be wrong: minor units of a currency.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The largest amount of one charge, in minor units: twelve digits, which is
/// also the most that Stripe takes in any currency.
pub const AMOUNT_MAX: i64 = 999_999_999_999;

/// A whole number of minor units (cents, yen), from 1 to [`AMOUNT_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Amount(i64);

impl Amount {
    /// `None` outside of 1 to [`AMOUNT_MAX`].
    #[must_use]
    pub fn new(minor_units: i64) -> Option<Self> {
        (1..=AMOUNT_MAX)
            .contains(&minor_units)
            .then_some(Self(minor_units))
    }

    /// The number of minor units.
    #[must_use]
    pub fn minor_units(self) -> i64 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let minor_units = i64::deserialize(deserializer)?;
        Self::new(minor_units).ok_or_else(|| de::Error::custom("not an amount"))
    }
}

/// A currency by its code: three lower-case letters.
///
/// Which codes may be charged is a question about input, and its answer changes:
/// currencies are retired, and with a release the list of them is another one.
/// What is stored was right when it was written, and stays readable.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Currency([u8; 3]);

impl Currency {
    /// From input: the code in lower case, as Stripe writes it (`usd`), of a
    /// currency that [is in use](Self::is_in_use).
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::from_stored(code).filter(|currency| currency.is_in_use())
    }

    /// From a row, or from an answer of the service: any code of the right form,
    /// also one that is not, or no longer, a currency in use.
    #[must_use]
    pub fn from_stored(code: &str) -> Option<Self> {
        let code: [u8; 3] = code.as_bytes().try_into().ok()?;
        code.iter()
            .all(u8::is_ascii_lowercase)
            .then_some(Self(code))
    }

    /// Whether it is an ISO 4217 currency in use today. Funds, metals and
    /// currencies that were superseded are none.
    #[must_use]
    pub fn is_in_use(self) -> bool {
        iso_currency::Currency::from_code(&self.code().to_ascii_uppercase())
            .is_some_and(|c| !c.is_special() && !c.is_fund() && c.is_superseded().is_none())
    }

    /// The code in lower case.
    #[must_use]
    pub fn code(self) -> String {
        self.0.map(char::from).iter().collect()
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.code())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.code())
    }
}

impl<'de> Deserialize<'de> for Currency {
    /// What is deserialized are answers of the service.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let code = String::deserialize(deserializer)?;
        Self::from_stored(&code).ok_or_else(|| de::Error::custom("not a currency code"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_is_positive_and_bounded() {
        for wrong in [i64::MIN, -1, 0, AMOUNT_MAX + 1, i64::MAX] {
            assert_eq!(Amount::new(wrong), None, "{wrong}");
        }
        assert_eq!(Amount::new(1).map(Amount::minor_units), Some(1));
        assert_eq!(
            Amount::new(AMOUNT_MAX).map(Amount::minor_units),
            Some(AMOUNT_MAX)
        );
    }

    #[test]
    fn a_currency_is_in_use_and_in_lower_case() {
        for code in ["usd", "eur", "jpy", "xof"] {
            assert_eq!(
                Currency::from_code(code).map(Currency::code).as_deref(),
                Some(code)
            );
        }
        for wrong in [
            "USD", "Usd", "", "us", "usdd", "zzz", "xxx", "xts", "xau", "hrk", "u d",
        ] {
            assert_eq!(Currency::from_code(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_stored_currency_has_the_form_of_one() {
        // Retired, a metal, and no currency at all.
        for code in ["usd", "hrk", "xau", "zzz"] {
            let stored = Currency::from_stored(code).map(Currency::code);
            assert_eq!(stored.as_deref(), Some(code));
        }
        for wrong in ["", "us", "usdd", "USD", "u d", "us1", "€"] {
            assert_eq!(Currency::from_stored(wrong), None, "{wrong:?}");
        }
    }
}
