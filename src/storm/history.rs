//! What a linearizability checker is given: a line of JSON for each request that
//! reached the service, and for each charge that was changed how it stood in the
//! end.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
    path::Path,
    time::Duration,
};

use serde::Serialize;
use serde_json::Value;

use super::{
    customers::Shop,
    ledger::{Answer, KeyId, Operation, Said},
    script::Kind,
};

/// Times are in nanoseconds since the start.
#[derive(Serialize)]
#[serde(tag = "line", rename_all = "lowercase")]
enum Line {
    /// A request.
    Asked {
        customer: u32,
        /// 0 is the customer's charge, the others are its changes.
        number: u8,
        kind: Kind,
        cart: u8,
        /// The amount that it named.
        wanted: Option<i64>,
        called: u64,
        /// Null if nothing came back.
        returned: Option<u64>,
        /// `answer`, `refused` (the charge does not allow it), `reused` or
        /// `unknown`.
        said: &'static str,
        /// Of status and body, of both kinds of answers.
        digest: Option<u64>,
        /// Of an answer: what was charged, captured or refunded.
        amount: Option<i64>,
        /// Of a refusal: why.
        code: Option<String>,
    },
    /// A charge, as GET showed it when every key had its answer.
    Read {
        customer: u32,
        called: u64,
        returned: u64,
        /// Whether the charge took no money at first.
        authorised: bool,
        amount: i64,
        captured: i64,
        refunded: i64,
    },
}

/// How a changed charge stood in the end.
#[derive(Debug, Clone)]
pub struct Read {
    pub customer: u32,
    pub called: Duration,
    pub returned: Duration,
    pub authorised: bool,
    pub amount: i64,
    pub captured: i64,
    pub refunded: i64,
}

pub fn write(file: &Path, shop: &Shop, reads: &[Read]) -> std::io::Result<()> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(file)?);
    let mut line = |line: &Line| {
        serde_json::to_writer(&mut out, line)?;
        out.write_all(b"\n")
    };
    let mut written = Ok(());
    shop.ledger.for_each(|key, operations| {
        let wanted = amounts(shop, key);
        for operation in operations {
            if written.is_ok()
                && let Some(asked) = Line::asked(shop, key, wanted, operation)
            {
                written = line(&asked);
            }
        }
    });
    written?;
    for read in reads {
        line(&Line::Read {
            customer: read.customer,
            called: nanos(read.called),
            returned: nanos(read.returned),
            authorised: read.authorised,
            amount: read.amount,
            captured: read.captured,
            refunded: read.refunded,
        })?;
    }
    out.flush()
}

/// What a key's two carts name.
fn amounts(shop: &Shop, key: KeyId) -> [Option<i64>; 2] {
    match key.number {
        0 => shop.charge(key.customer).amounts,
        number => shop
            .begun(key.customer)
            .and_then(|begun| Some(begun.changes.get(usize::from(number) - 1)?.amounts))
            .unwrap_or_default(),
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Line {
    fn asked(
        shop: &Shop,
        key: KeyId,
        amounts: [Option<i64>; 2],
        operation: &Operation,
    ) -> Option<Self> {
        let (mut digest, mut amount, mut code) = (None, None, None);
        let said = match &operation.said {
            Said::Answer(answer) => {
                digest = Some(digest_of(shop, operation.kind, answer.clone()));
                if operation.kind != Kind::Charge && answer.status != 200 {
                    code = answer.refusal();
                    "refused"
                } else {
                    amount = moved(operation.kind, answer);
                    "answer"
                }
            }
            Said::Reused => "reused",
            Said::Unreached => return None,
            Said::Refused | Said::Unknown => "unknown",
        };
        Some(Self::Asked {
            customer: key.customer,
            number: key.number,
            kind: operation.kind,
            cart: operation.cart,
            wanted: amounts[usize::from(operation.cart)],
            called: nanos(operation.called),
            returned: operation.returned.map(nanos),
            said,
            digest,
            amount,
            code,
        })
    }
}

fn digest_of(shop: &Shop, kind: Kind, answer: Answer) -> u64 {
    let mut hasher = DefaultHasher::new();
    shop.compared(kind, answer).hash(&mut hasher);
    hasher.finish()
}

fn moved(kind: Kind, answer: &Answer) -> Option<i64> {
    let body: Value = serde_json::from_str(&answer.body).ok()?;
    let name = match kind {
        Kind::Charge | Kind::Refund => "amount",
        Kind::Capture => "amount_captured",
    };
    body[name].as_i64()
}
