//! Amounts that cannot be wrong: minor units of a currency that circulates.

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

/// An ISO 4217 currency in use today; funds, metals and currencies that were
/// superseded are none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Currency(iso_currency::Currency);

impl Currency {
    /// From its code in lower case, as Stripe writes it (`usd`).
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        if !code.bytes().all(|b| b.is_ascii_lowercase()) {
            return None;
        }
        iso_currency::Currency::from_code(&code.to_ascii_uppercase())
            .filter(|c| !c.is_special() && !c.is_fund() && c.is_superseded().is_none())
            .map(Self)
    }

    /// The code in lower case.
    #[must_use]
    pub fn code(self) -> String {
        self.0.code().to_ascii_lowercase()
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
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let code = String::deserialize(deserializer)?;
        Self::from_code(&code).ok_or_else(|| de::Error::custom("not a currency in use"))
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
}
