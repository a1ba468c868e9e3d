//! Identifiers: a prefix that says of what, and a UUIDv7 in 32 hex digits.
//!
//! A UUIDv7 begins with the milliseconds since 1970, so ids sort by the time
//! they were made and new rows go to the end of an index.

use std::{fmt, str::FromStr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// A text that is not an identifier of the kind that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an identifier of this kind is `{prefix}_` followed by 32 lower-case hex digits")]
pub struct MalformedId {
    prefix: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new one, later in order than all that this process made before.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "no two are equal, so none is a default")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.simple())
            }
        }

        impl FromStr for $name {
            type Err = MalformedId;

            fn from_str(text: &str) -> Result<Self, MalformedId> {
                let malformed = MalformedId { prefix: $prefix };
                let hex = text.strip_prefix(concat!($prefix, "_")).ok_or(malformed)?;
                // Uuid::parse_str alone takes hyphens, braces and upper case too,
                // and one thing should have one name.
                let canonical = hex.len() == 32
                    && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if !canonical {
                    return Err(malformed);
                }
                Uuid::parse_str(hex).map(Self).map_err(|_| malformed)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

id!(
    /// A merchant: the owner of charges and the scope of idempotency keys.
    AccountId,
    "acct"
);
id!(
    /// The public name of an API key; the key itself is a secret.
    ApiKeyId,
    "ak"
);
id!(
    /// A charge. Given out when the request is parsed, before anything is stored.
    ChargeId,
    "ch"
);
id!(
    /// A refund of a charge.
    RefundId,
    "re"
);
id!(
    /// One HTTP request; a replay has one of its own.
    RequestId,
    "req"
);

impl ChargeId {
    /// When it was given out, by the service's clock, to the second.
    #[must_use]
    pub fn created_at(self) -> DateTime<Utc> {
        created_at(self.0)
    }
}

impl RefundId {
    /// When it was given out, by the service's clock, to the second.
    #[must_use]
    pub fn created_at(self) -> DateTime<Utc> {
        created_at(self.0)
    }
}

fn created_at(id: Uuid) -> DateTime<Utc> {
    id.get_timestamp()
        .and_then(|at| i64::try_from(at.to_unix().0).ok())
        .and_then(|seconds| DateTime::from_timestamp(seconds, 0))
        .unwrap_or_default()
}

/// The smallest of all ids that are given out from this second on; ids sort by
/// their time, so it divides the earlier from the later ones.
#[must_use]
pub fn first_of(unix_seconds: u64) -> Uuid {
    // 48 bits of milliseconds; beyond them every id is earlier.
    let milliseconds = unix_seconds.saturating_mul(1000).min((1 << 48) - 1);
    Uuid::from_u128(u128::from(milliseconds) << 80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_spelling() {
        let id = ChargeId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        let hex = id.0.simple().to_string();
        for wrong in [
            hex.clone(),
            format!("re_{hex}"),
            format!("ch_{}", id.0),
            format!("ch_{}", &hex[1..]),
            format!("ch_{hex}0"),
            format!("ch_{}", "A".repeat(32)),
            format!("ch_{{{}}}", &hex[2..]),
            "ch_".to_owned(),
            String::new(),
        ] {
            assert!(wrong.parse::<ChargeId>().is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn ids_sort_by_the_time_they_were_made() {
        let ids: Vec<_> = (0..1000).map(|_| ChargeId::new()).collect();
        assert!(ids.is_sorted());
    }

    #[test]
    fn a_charge_is_dated_by_its_id() {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let age = now.abs_diff(ChargeId::new().created_at().timestamp().cast_unsigned());
        assert!(age <= 2, "{age}");
    }
}
