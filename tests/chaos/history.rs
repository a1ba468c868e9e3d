//! Is each key a register that is written once? First answer wins, all later
//! ones equal, 422 only for the other cart and only after a first one.

use std::{collections::BTreeMap, path::Path, time::Duration};

use porcupine_rs::{CheckResult, Model, Operation, check_operations_timeout};
use serde::Deserialize;

/// A line of the storm's `--history`.
#[derive(Debug, Clone, Deserialize)]
pub struct Line {
    key: u32,
    cart: u8,
    called: i64,
    returned: Option<i64>,
    said: Said,
    digest: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Answer,
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
            (Said::Answer, None) => (true, Some((cart, digest))),
            (Said::Answer, Some((owner, None))) => (owner == cart, Some((owner, digest))),
            (Said::Answer, Some((owner, seen))) => (owner == cart && seen == digest, *state),
            (Said::Reused, Some((owner, _))) => (owner != cart, *state),
            (Said::Reused, None) => (false, None),
            (Said::Unknown, None) => (true, Some((cart, None))),
            (Said::Unknown, Some(_)) => (true, *state),
        }
    }
}

/// How the checking of one history went.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Linearizable,
    /// By this key.
    Broken(u32),
    /// This key's history is too tangled to be decided in time.
    Undecided(u32),
}

/// Reads what the storm wrote, and checks each key by itself.
pub fn check(file: &Path) -> Verdict {
    let text = std::fs::read_to_string(file).unwrap();
    check_lines(text.lines().map(|line| serde_json::from_str(line).unwrap()))
}

fn check_lines(lines: impl Iterator<Item = Line>) -> Verdict {
    let mut keys: BTreeMap<u32, Vec<Operation<WriteOnce>>> = BTreeMap::new();
    for line in lines {
        // What has not come back, or said that it does not know, may take
        // effect at any time after, which is the same as never coming back.
        let returned = line.returned.filter(|_| line.said != Said::Unknown);
        keys.entry(line.key).or_default().push(Operation {
            client_id: None,
            call_time: line.called,
            return_time: returned.unwrap_or(i64::MAX),
            op: (line.cart, line.said, line.digest),
            metadata: None,
        });
    }
    for (key, operations) in keys {
        match check_operations_timeout(&operations, Duration::from_secs(10)) {
            CheckResult::Ok => {}
            CheckResult::Illegal => return Verdict::Broken(key),
            CheckResult::Unknown => return Verdict::Undecided(key),
        }
    }
    Verdict::Linearizable
}

/// A checker that lets everything pass proves nothing: it has to find these.
pub fn check_the_checker() {
    let line = |cart, called, returned, said, digest| Line {
        key: 7,
        cart,
        called,
        returned,
        said,
        digest,
    };
    let verdict = |lines: &[Line]| check_lines(lines.iter().cloned());
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
        assert_eq!(verdict(&bad), Verdict::Broken(7), "{bad:?}");
    }
}
