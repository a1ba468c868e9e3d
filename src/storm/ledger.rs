//! Every request that reached the service, and what came back, whoever saw it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::script::Kind;

/// A key: of a customer's charge, which is number 0, or of one of its changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyId {
    pub customer: u32,
    pub number: u8,
}

impl KeyId {
    pub fn charge(customer: u32) -> Self {
        Self {
            customer,
            number: 0,
        }
    }
}

/// What the service said to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// An outcome: 200 or 402, or that the charge does not allow the change. The
    /// bytes are kept, since they must not differ.
    Answer(Answer),
    /// 422: the key belongs to another request.
    Reused,
    /// 4xx of another kind, which no request of the storm deserves.
    Refused,
    /// 409, 5xx, or nothing: whether it has had an effect, or will, is not known.
    Unknown,
    /// There was no connection, so it was never sent.
    Unreached,
}

impl Said {
    /// What a status and a body mean for a key.
    pub fn of(kind: Kind, status: u16, body: &Arc<str>) -> Self {
        let answer = || Answer {
            status,
            body: Arc::clone(body),
        };
        match status {
            200 => Self::Answer(answer()),
            402 if kind == Kind::Charge => Self::Answer(answer()),
            400 if kind != Kind::Charge
                && answer()
                    .refusal()
                    .is_some_and(|code| REFUSALS.contains(&&*code)) =>
            {
                Self::Answer(answer())
            }
            422 => Self::Reused,
            409 | 500.. => Self::Unknown,
            _ => Self::Refused,
        }
    }
}

/// What a charge's state can forbid, in `error.code`.
const REFUSALS: [&str; 4] = [
    "amount_too_large",
    "charge_already_captured",
    "charge_already_refunded",
    "charge_not_captured",
];

/// An outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Answer {
    pub status: u16,
    pub body: Arc<str>,
}

impl Answer {
    /// The id of the charge that it tells of.
    pub fn charge_id(&self) -> Option<String> {
        let body: Value = serde_json::from_str(&self.body).ok()?;
        let id = if self.status == 200 {
            &body["id"]
        } else {
            &body["error"]["charge"]
        };
        id.as_str().map(str::to_owned)
    }

    /// Why it is a refusal, if it is one.
    pub fn refusal(&self) -> Option<String> {
        let body: Value = (self.status != 200).then(|| serde_json::from_str(&self.body).ok())??;
        body["error"]["code"].as_str().map(str::to_owned)
    }

    /// What of it has to stay the same once answers expire while the storm blows.
    /// A charge's answer is written anew, and tells its present state; a refund's
    /// is written anew too, and a refund never changes; a refusal is decided
    /// again; a capture is forgotten together with its answer, and refused then.
    pub fn lasting(self, kind: Kind) -> Self {
        let nothing = Self {
            status: 0,
            body: "".into(),
        };
        match (kind, self.status) {
            (Kind::Capture, _) | (Kind::Refund, 400) => nothing,
            (Kind::Charge, 200) => match serde_json::from_str::<Value>(&self.body) {
                Ok(Value::Object(mut charge)) => {
                    for name in ["amount_captured", "amount_refunded", "captured", "refunded"] {
                        charge.remove(name);
                    }
                    let body = Value::Object(charge).to_string().into();
                    Self { body, ..self }
                }
                _ => self,
            },
            _ => self,
        }
    }
}

/// One request that was forwarded.
#[derive(Debug, Clone)]
pub struct Operation {
    pub kind: Kind,
    /// Which request it was: the customer's first cart, or the changed one.
    pub cart: u8,
    pub called: Duration,
    /// `None` if nothing came back.
    pub returned: Option<Duration>,
    /// What it came back with.
    pub status: Option<u16>,
    pub said: Said,
    /// Whether the service called it a replay.
    pub replayed: bool,
}

/// The operations of each key, in the order in which they came back.
#[derive(Debug)]
pub struct Ledger {
    started: Instant,
    keys: Mutex<BTreeMap<KeyId, Vec<Operation>>>,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            keys: Mutex::default(),
        }
    }

    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// This key was asked for.
    pub fn record(&self, key: KeyId, operation: Operation) {
        self.keys().entry(key).or_default().push(operation);
    }

    fn keys(&self) -> MutexGuard<'_, BTreeMap<KeyId, Vec<Operation>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of one key.
    pub fn operations(&self, key: KeyId) -> Vec<Operation> {
        self.keys().get(&key).cloned().unwrap_or_default()
    }

    /// Of all keys.
    pub fn for_each(&self, mut look: impl FnMut(KeyId, &[Operation])) {
        for (key, operations) in self.keys().iter() {
            look(*key, operations);
        }
    }
}
