//! Every request that reached the service, and what came back, whoever saw it.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::Value;

/// What the service said to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// An outcome: 200 or 402. The bytes are kept, since they must not differ.
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
}

/// One request that was forwarded.
#[derive(Debug, Clone)]
pub struct Operation {
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
    keys: Mutex<BTreeMap<u32, Vec<Operation>>>,
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

    /// The key of this customer was asked for.
    pub fn record(&self, customer: u32, operation: Operation) {
        self.keys().entry(customer).or_default().push(operation);
    }

    fn keys(&self) -> MutexGuard<'_, BTreeMap<u32, Vec<Operation>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of one key.
    pub fn operations(&self, customer: u32) -> Vec<Operation> {
        self.keys().get(&customer).cloned().unwrap_or_default()
    }

    /// A line per request, times in nanoseconds since the start: `key`, `cart`,
    /// `called`, `returned` (null if nothing came back), and `said`:
    /// `answer` with a digest of status and body, `reused` or `unknown`.
    pub fn write(&self, file: &Path) -> std::io::Result<()> {
        #[derive(Serialize)]
        struct Line {
            key: u32,
            cart: u8,
            called: u64,
            returned: Option<u64>,
            said: &'static str,
            digest: Option<u64>,
        }
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let mut out = std::io::BufWriter::new(std::fs::File::create(file)?);
        for (&key, operations) in self.keys().iter() {
            for operation in operations {
                let (said, digest) = match &operation.said {
                    Said::Answer(answer) => {
                        let mut hasher = DefaultHasher::new();
                        answer.hash(&mut hasher);
                        ("answer", Some(hasher.finish()))
                    }
                    Said::Reused => ("reused", None),
                    Said::Unreached => continue,
                    Said::Refused | Said::Unknown => ("unknown", None),
                };
                let line = Line {
                    key,
                    cart: operation.cart,
                    called: nanos(operation.called),
                    returned: operation.returned.map(nanos),
                    said,
                    digest,
                };
                serde_json::to_writer(&mut out, &line)?;
                out.write_all(b"\n")?;
            }
        }
        out.flush()
    }
}
