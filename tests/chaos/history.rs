//! Is each key a register that is written once? First answer wins, all later
//! ones equal, 422 only for the other cart and only after a first one. And is each
//! charge that was captured and refunded a charge, whose captures and refunds were
//! decided one after the other?

use std::{collections::BTreeMap, path::Path, time::Duration};

use porcupine_rs::{CheckResult, Model, Operation, check_operations_timeout};
use serde::Deserialize;

/// A line of the storm's `--history`.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "line", rename_all = "lowercase")]
enum Line {
    Asked(Asked),
    Read(Read),
}

/// A request.
#[derive(Debug, Clone, Deserialize)]
struct Asked {
    customer: u32,
    /// 0 is the customer's charge, the others are its changes.
    number: u8,
    kind: Kind,
    cart: u8,
    /// The amount that it named.
    wanted: Option<i64>,
    called: i64,
    returned: Option<i64>,
    said: Said,
    digest: Option<u64>,
    /// Of an answer: what was charged, captured or refunded.
    amount: Option<i64>,
    /// Of a refusal.
    code: Option<String>,
}

/// A charge, as it was found in the end.
#[derive(Debug, Clone, Deserialize)]
struct Read {
    customer: u32,
    called: i64,
    returned: i64,
    authorised: bool,
    amount: i64,
    captured: i64,
    refunded: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Charge,
    Capture,
    Refund,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Answer,
    /// An answer too: the charge does not allow the change.
    Refused,
    Reused,
    Unknown,
}

#[derive(Debug, Clone)]
struct WriteOnce;

/// Which cart the key belongs to, and its answer as far as anybody has seen it.
type State = Option<(u8, Option<u64>)>;

impl Model for WriteOnce {
    type State = State;
    type Op = (u8, Said, Option<u64>);
    type Metadata = ();

    fn init() -> State {
        None
    }

    fn step(state: &State, &(cart, said, digest): &Self::Op) -> (bool, State) {
        match (said, *state) {
            // Whoever comes first makes the key its own.
            (Said::Answer | Said::Refused, None) => (true, Some((cart, digest))),
            (Said::Answer | Said::Refused, Some((owner, None))) => {
                (owner == cart, Some((owner, digest)))
            }
            (Said::Answer | Said::Refused, Some((owner, seen))) => {
                (owner == cart && seen == digest, *state)
            }
            (Said::Reused, Some((owner, _))) => (owner != cart, *state),
            (Said::Reused, None) => (false, None),
            (Said::Unknown, None) => (true, Some((cart, None))),
            (Said::Unknown, Some(_)) => (true, *state),
        }
    }
}

/// A charge, with what was captured and refunded of it.
#[derive(Debug, Clone)]
struct Ledger;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Balance {
    amount: i64,
    captured: i64,
    refunded: i64,
}

/// What is done to a charge, once for each key.
#[derive(Debug, Clone)]
enum Deed {
    /// The charge itself; it comes first.
    Open { amount: i64, captured: i64 },
    /// A change, and what was said: the amount that it moved, or why not; nothing
    /// if nobody knows.
    Change {
        kind: Kind,
        asked: Option<i64>,
        outcome: Option<Result<i64, String>>,
    },
    /// It was read.
    Read(Balance),
}

impl Balance {
    /// What a capture or a refund moves, or why it may not; the same rules as the
    /// service's, written a second time.
    fn decide(&mut self, kind: Kind, asked: Option<i64>) -> Result<i64, &'static str> {
        let refundable = match self.captured {
            0 => self.amount,
            captured => captured,
        };
        let left = match kind {
            Kind::Capture if self.captured > 0 => return Err("charge_already_captured"),
            Kind::Capture if self.refunded > 0 => return Err("charge_already_refunded"),
            Kind::Charge | Kind::Capture => self.amount,
            Kind::Refund if self.refunded == refundable => return Err("charge_already_refunded"),
            Kind::Refund => refundable - self.refunded,
        };
        let amount = asked.unwrap_or(left);
        if amount > left {
            return Err("amount_too_large");
        }
        match kind {
            Kind::Refund if self.captured == 0 && amount < left => {
                return Err("charge_not_captured");
            }
            Kind::Refund => self.refunded += amount,
            Kind::Charge | Kind::Capture => self.captured = amount,
        }
        Ok(amount)
    }
}

impl Model for Ledger {
    type State = Option<Balance>;
    type Op = Deed;
    type Metadata = ();

    fn init() -> Self::State {
        None
    }

    fn step(state: &Self::State, deed: &Deed) -> (bool, Self::State) {
        let Some(before) = *state else {
            return match *deed {
                Deed::Open { amount, captured } => {
                    let opened = Balance {
                        amount,
                        captured,
                        refunded: 0,
                    };
                    (true, Some(opened))
                }
                _ => (false, None),
            };
        };
        match deed {
            Deed::Open { .. } => (false, *state),
            Deed::Read(balance) => (before == *balance, *state),
            Deed::Change {
                kind,
                asked,
                outcome,
            } => {
                let mut after = before;
                let decided = after.decide(*kind, *asked);
                let as_told = match outcome {
                    None => true,
                    Some(Ok(amount)) => decided == Ok(*amount),
                    Some(Err(code)) => decided == Err(code.as_str()),
                };
                (as_told, Some(after))
            }
        }
    }
}

/// How the checking of one history went.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Linearizable,
    /// By this key of this customer.
    BrokenKey(u32, u8),
    /// By the changes of this customer's charge.
    BrokenCharge(u32),
    /// This customer's history is too tangled to be decided in time.
    Undecided(u32),
}

/// Reads what the storm wrote, and checks each key, and each charge, by itself.
/// Where answers expired meanwhile, what was refused may have been decided again,
/// and a capture been forgotten: a refusal says nothing about its key then.
pub fn check(file: &Path, answers_expire: bool) -> Verdict {
    let text = std::fs::read_to_string(file).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    check_lines(lines, answers_expire)
}

fn check_lines(lines: impl Iterator<Item = Line>, answers_expire: bool) -> Verdict {
    let mut keys: BTreeMap<(u32, u8), Vec<Asked>> = BTreeMap::new();
    let mut reads = Vec::new();
    for line in lines {
        match line {
            Line::Asked(asked) => keys
                .entry((asked.customer, asked.number))
                .or_default()
                .push(asked),
            Line::Read(read) => reads.push(read),
        }
    }
    for (&(customer, number), asked) in &keys {
        match check_operations_timeout(&of_key(asked, answers_expire), TIME_MAX) {
            CheckResult::Ok => {}
            CheckResult::Illegal => return Verdict::BrokenKey(customer, number),
            CheckResult::Unknown => return Verdict::Undecided(customer),
        }
    }
    for read in reads {
        let customer = read.customer;
        let changes = keys.range((customer, 1)..=(customer, u8::MAX));
        let mut operations = vec![
            operation(
                i64::MIN,
                Some(i64::MIN),
                Deed::Open {
                    amount: read.amount,
                    captured: if read.authorised { 0 } else { read.amount },
                },
            ),
            operation(
                read.called,
                Some(read.returned),
                Deed::Read(Balance {
                    amount: read.amount,
                    captured: read.captured,
                    refunded: read.refunded,
                }),
            ),
        ];
        for (_, asked) in changes {
            operations.extend(of_charge(asked, answers_expire));
        }
        match check_operations_timeout(&operations, TIME_MAX) {
            CheckResult::Ok => {}
            CheckResult::Illegal => return Verdict::BrokenCharge(customer),
            CheckResult::Unknown => return Verdict::Undecided(customer),
        }
    }
    Verdict::Linearizable
}

const TIME_MAX: Duration = Duration::from_secs(10);

fn operation<M: Model<Metadata = ()>>(
    called: i64,
    returned: Option<i64>,
    op: M::Op,
) -> Operation<M> {
    Operation {
        client_id: None,
        call_time: called,
        return_time: returned.unwrap_or(i64::MAX),
        op,
        metadata: None,
    }
}

/// The history of one key.
fn of_key(asked: &[Asked], answers_expire: bool) -> Vec<Operation<WriteOnce>> {
    asked
        .iter()
        .map(|asked| {
            let said = match asked.said {
                Said::Refused if answers_expire => Said::Unknown,
                said => said,
            };
            // What has not come back, or said that it does not know, may take
            // effect at any time after, which is the same as never coming back.
            let returned = asked.returned.filter(|_| said != Said::Unknown);
            operation(asked.called, returned, (asked.cart, said, asked.digest))
        })
        .collect()
}

/// What a key, whose own history is in order, did to its charge: one deed, not
/// before it was first asked for, and not after the first who was answered. So all
/// its other requests say nothing that this one does not; and with a handful of
/// deeds to a charge, however many requests there were, the checker has an easy
/// time. A key without an answer may have done it or not, with either cart.
fn of_charge(asked: &[Asked], answers_expire: bool) -> Vec<Operation<Ledger>> {
    let answered = |asked: &&Asked| match asked.said {
        Said::Answer => true,
        // The capture that it is refused for may be its own, forgotten.
        Said::Refused => !(answers_expire && asked.kind == Kind::Capture),
        Said::Reused | Said::Unknown => false,
    };
    let first_called = |cart: u8| {
        let same = asked.iter().filter(|other| other.cart == cart);
        same.map(|other| other.called).min().unwrap_or(i64::MIN)
    };
    let first = asked
        .iter()
        .filter(answered)
        // What was done counts more than what is said of it after it expired.
        .min_by_key(|asked| (asked.said != Said::Answer, asked.returned));
    if let Some(first) = first {
        let outcome = match first.said {
            Said::Answer => Ok(first.amount.unwrap_or_default()),
            _ => Err(first.code.clone().unwrap_or_default()),
        };
        let deed = Deed::Change {
            kind: first.kind,
            asked: first.wanted,
            outcome: Some(outcome),
        };
        return vec![operation(first_called(first.cart), first.returned, deed)];
    }
    [0, 1]
        .into_iter()
        .filter_map(|cart| asked.iter().find(|asked| asked.cart == cart))
        .map(|one| {
            let deed = Deed::Change {
                kind: one.kind,
                asked: one.wanted,
                outcome: None,
            };
            operation(first_called(one.cart), None, deed)
        })
        .collect()
}

/// A checker that lets everything pass proves nothing: it has to find these.
pub fn check_the_checker() {
    check_the_keys();
    check_the_charges();
}

fn asked(cart: u8, called: i64, returned: Option<i64>, said: Said, digest: Option<u64>) -> Asked {
    Asked {
        customer: 7,
        number: 0,
        kind: Kind::Charge,
        cart,
        wanted: None,
        called,
        returned,
        said,
        digest,
        amount: None,
        code: None,
    }
}

fn check_the_keys() {
    let line = asked;
    let verdict = |lines: &[Asked]| check_lines(lines.iter().cloned().map(Line::Asked), false);
    let first = line(0, 0, Some(10), Said::Answer, Some(1));
    let unknown = line(1, 0, None, Said::Unknown, None);
    for good in [
        vec![
            first.clone(),
            line(0, 20, Some(30), Said::Answer, Some(1)),
            line(1, 40, Some(50), Said::Reused, None),
        ],
        // The one that got no answer came first after all.
        vec![
            unknown.clone(),
            line(0, 5, Some(10), Said::Reused, None),
            line(1, 20, Some(30), Said::Answer, Some(2)),
        ],
        // It never arrived.
        vec![
            unknown.clone(),
            line(0, 5, Some(10), Said::Answer, Some(1)),
            line(1, 20, Some(30), Said::Reused, None),
        ],
    ] {
        assert_eq!(verdict(&good), Verdict::Linearizable, "{good:?}");
    }
    for bad in [
        vec![first.clone(), line(0, 20, Some(30), Said::Answer, Some(2))],
        vec![first.clone(), line(1, 20, Some(30), Said::Answer, Some(2))],
        vec![
            line(0, 0, Some(10), Said::Reused, None),
            line(1, 20, Some(30), Said::Answer, Some(1)),
        ],
        vec![first, line(0, 20, Some(30), Said::Reused, None)],
        // What got no answer cannot have come before it was asked.
        vec![
            line(0, 0, Some(10), Said::Reused, None),
            line(1, 20, None, Said::Unknown, None),
        ],
    ] {
        assert_eq!(verdict(&bad), Verdict::BrokenKey(7, 0), "{bad:?}");
    }
}

fn check_the_charges() {
    let change = |number, kind, wanted, (called, returned), outcome: Option<Result<i64, &str>>| {
        let said = match outcome {
            None => Said::Unknown,
            Some(Ok(_)) => Said::Answer,
            Some(Err(_)) => Said::Refused,
        };
        Line::Asked(Asked {
            number,
            kind,
            wanted,
            amount: outcome.and_then(Result::ok),
            code: outcome.and_then(Result::err).map(str::to_owned),
            ..asked(0, called, Some(returned), said, Some(1))
        })
    };
    let read = |authorised, captured, refunded| {
        Line::Read(Read {
            customer: 7,
            called: 1000,
            returned: 1010,
            authorised,
            amount: 100,
            captured,
            refunded,
        })
    };
    let (capture, refund) = (Kind::Capture, Kind::Refund);
    let too_large = Some(Err("amount_too_large"));
    let captured = Some(Err("charge_already_captured"));
    for good in [
        vec![
            change(1, capture, Some(60), (0, 10), Some(Ok(60))),
            change(2, capture, None, (20, 30), captured),
            change(3, refund, Some(40), (40, 50), Some(Ok(40))),
            change(4, refund, None, (60, 70), Some(Ok(20))),
            read(true, 60, 60),
        ],
        // Of two at once either may be the first.
        vec![
            change(1, refund, Some(60), (0, 20), too_large),
            change(2, refund, Some(60), (10, 15), Some(Ok(60))),
            read(false, 100, 60),
        ],
        // The one that got no answer came first, and one that never arrived.
        vec![
            change(1, refund, Some(60), (0, 10), None),
            change(2, refund, Some(60), (20, 30), too_large),
            read(false, 100, 60),
        ],
        vec![
            change(1, refund, Some(60), (0, 10), None),
            read(false, 100, 0),
        ],
        // Cancelled.
        vec![
            change(1, refund, None, (0, 10), Some(Ok(100))),
            change(
                2,
                capture,
                None,
                (20, 30),
                Some(Err("charge_already_refunded")),
            ),
            read(true, 0, 100),
        ],
    ] {
        let verdict = check_lines(good.iter().cloned(), false);
        assert_eq!(verdict, Verdict::Linearizable, "{good:?}");
    }
    for bad in [
        // More than is left, together.
        vec![
            change(1, refund, Some(60), (0, 20), Some(Ok(60))),
            change(2, refund, Some(60), (10, 30), Some(Ok(60))),
            read(false, 100, 120),
        ],
        // Two captures.
        vec![
            change(1, capture, Some(60), (0, 20), Some(Ok(60))),
            change(2, capture, Some(40), (10, 30), Some(Ok(40))),
            read(true, 100, 0),
        ],
        // Refused for the sake of one that came later.
        vec![
            change(1, refund, Some(60), (0, 10), too_large),
            change(2, refund, Some(60), (20, 30), Some(Ok(60))),
            read(false, 100, 60),
        ],
        // Lost, or done although it was refused.
        vec![
            change(1, refund, Some(60), (0, 10), Some(Ok(60))),
            read(false, 100, 0),
        ],
        vec![
            change(1, capture, Some(101), (0, 10), too_large),
            read(true, 101, 0),
        ],
        // A refund that nobody asked for.
        vec![read(false, 100, 1)],
        // Another reason than the right one.
        vec![
            change(1, capture, None, (0, 10), captured),
            read(true, 0, 0),
        ],
    ] {
        let verdict = check_lines(bad.iter().cloned(), false);
        assert_eq!(verdict, Verdict::BrokenCharge(7), "{bad:?}");
    }
}
