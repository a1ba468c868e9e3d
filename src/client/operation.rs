//! One operation with its key and its bytes, fixed before it is sent.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use reqwest::header::HeaderValue;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::outcome::{Failure, Last};
use crate::{
    charges::ChargeRequest,
    idempotency::{Key, MalformedKey},
};

/// One operation: its idempotency key and the very bytes of its request.
///
/// It can be written down (serde) before it is sent, and read again after a
/// crash; what was read asks under the same key for the same. As JSON it is an
/// object of two texts, `idempotency_key` and `body`. Clones are the same
/// operation.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Operation {
    key: Key,
    body: Arc<str>,
    /// How many attempts are not certain to have charged nobody.
    doubts: Arc<AtomicUsize>,
}

/// What was read is no operation that was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an operation: {0}")]
pub struct MalformedOperation(#[from] MalformedKey);

#[derive(Serialize, Deserialize)]
struct Written {
    idempotency_key: String,
    body: String,
}

impl Operation {
    /// A charge under a new key, a UUID.
    ///
    /// # Panics
    /// Never: a request holds strings, booleans and integers, and a UUID is a key.
    #[must_use]
    pub fn charge(request: &ChargeRequest) -> Self {
        let key = Uuid::now_v7().to_string();
        let body =
            serde_json::to_string(request).expect("strings, booleans and integers are always JSON");
        Self {
            key: Key::from_header(key.as_bytes()).expect("hex digits and hyphens are a key"),
            body: body.into(),
            doubts: Arc::default(),
        }
    }

    /// The same operation under a key of the caller's, such as the order's number.
    /// Nobody here knows whether this key was sent before, so what is not the
    /// key's own outcome is [`Failure::Unknown`] from now on.
    #[must_use]
    pub fn with_key(self, key: Key) -> Self {
        Self {
            key,
            doubts: Arc::new(AtomicUsize::new(1)),
            ..self
        }
    }

    /// The key that every attempt carries.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    pub(super) fn key_header(&self) -> HeaderValue {
        let mut value = HeaderValue::try_from(self.key.to_header())
            .expect("a key is visible ASCII, and so is its quoted form");
        value.set_sensitive(true);
        value
    }

    pub(super) fn body(&self) -> String {
        self.body.as_ref().to_owned()
    }

    /// An attempt begins.
    pub(super) fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::SeqCst);
    }

    /// An attempt that began has charged nobody.
    pub(super) fn clear_doubt(&self) {
        self.doubts.fetch_sub(1, Ordering::SeqCst);
    }

    /// What is certain after the last attempt.
    pub(super) fn failure(&self, last: Last) -> Failure {
        if self.doubts.load(Ordering::SeqCst) == 0 {
            match last {
                Last::NotReached(cause) => return Failure::NotSent(cause),
                Last::Refused(refusal) => return Failure::Refused(refusal),
                Last::TimedOut
                | Last::Broken(_)
                | Last::NotUnderstood { .. }
                | Last::Unavailable(_) => {}
            }
        }
        Failure::Unknown {
            key: self.key.clone(),
            last,
        }
    }
}

impl fmt::Debug for Operation {
    /// Neither the key nor the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Operation({:?}, {} bytes)", self.key, self.body.len())
    }
}

impl From<Operation> for Written {
    fn from(operation: Operation) -> Self {
        Self {
            idempotency_key: operation.key.to_header(),
            body: operation.body(),
        }
    }
}

impl TryFrom<Written> for Operation {
    type Error = MalformedOperation;

    fn try_from(written: Written) -> Result<Self, MalformedOperation> {
        Ok(Self {
            key: Key::from_header(written.idempotency_key.as_bytes())?,
            body: written.body.into(),
            // It may have been sent before the crash.
            doubts: Arc::new(AtomicUsize::new(1)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::money::{Amount, Currency};

    fn operation() -> Operation {
        let (amount, currency) = (Amount::new(5000), Currency::from_code("usd"));
        Operation::charge(&ChargeRequest::new(amount.unwrap(), currency.unwrap()))
    }

    #[test]
    fn two_operations_have_two_keys_and_a_clone_has_the_same() {
        let one = operation();
        assert_ne!(one.key(), operation().key());
        assert_eq!(one.key(), one.clone().key());
    }

    proptest! {
        #[test]
        fn every_key_survives_the_header_and_being_written_down(text in "[!-~]{1,255}") {
            let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
            let key = Key::from_header(quoted.as_bytes()).unwrap();
            let operation = operation().with_key(key.clone());
            prop_assert_eq!(Key::from_header(operation.key_header().as_bytes()), Ok(key.clone()));
            let written = serde_json::to_string(&operation).unwrap();
            let read: Operation = serde_json::from_str(&written).unwrap();
            prop_assert_eq!(read.key(), &key);
            prop_assert_eq!(read.body(), operation.body());
        }
    }
}
