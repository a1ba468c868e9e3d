//! The fingerprint: what a request means, in 33 bytes.

use std::fmt;

use serde::Serialize;
use sha2::{Digest, Sha256};

/// The version that new fingerprints carry in their first byte.
///
/// A release that changes what goes into the hash raises it and keeps the
/// old computation beside the new one: an honest retry that arrives after an
/// upgrade must not become a 422.
const VERSION: u8 = 1;

/// SHA-256 over version, method, path and the typed request as canonical JSON
/// (RFC 8785), behind one byte of version.
///
/// It is taken from the parsed request and not from its bytes, so the order of
/// fields, white space, and JSON or form make no difference; another path does.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 33]);

impl Fingerprint {
    /// Of a request to `method` and `path`.
    ///
    /// # Panics
    /// If `request` cannot be written as JSON, which no type of ours can bring
    /// about: they hold strings, integers, booleans and maps keyed by strings.
    pub fn new(method: &str, path: &str, request: &impl Serialize) -> Self {
        let canonical = serde_json_canonicalizer::to_vec(request)
            .expect("a typed request is plain data and always has a canonical form");
        let mut hash = Sha256::new();
        hash.update([VERSION]);
        // Neither a method nor a path can contain a line feed, so no two
        // requests run together to the same bytes.
        for part in [method, path] {
            hash.update(part.as_bytes());
            hash.update(b"\n");
        }
        hash.update(&canonical);
        let mut bytes = [VERSION; 33];
        bytes[1..].copy_from_slice(&hash.finalize());
        Self(bytes)
    }

    /// For a key that stands for the same thing whatever comes with it.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self::new("", "", &())
    }

    /// From a `request_hash` column; `None` if it has another length.
    #[must_use]
    pub fn from_column(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// For the `request_hash` column.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this release can compute fingerprints of this one's version. A
    /// row of a newer release, met in the middle of a rollout, can be neither
    /// replayed nor refused: which of the two would be a guess.
    #[must_use]
    pub fn is_comparable(&self) -> bool {
        self.0[0] == VERSION
    }
}

/// A digest per field of a request, to tell somebody who uses a key again what
/// differs from the first time, without keeping what it was.
///
/// One byte of version, four of the digest of method and path, then six for each
/// field, in the order of their names. They are compared only where all of that
/// has the same form, so a release that adds a field says nothing of older rows.
#[derive(Clone, PartialEq, Eq)]
pub struct FieldDigests {
    names: Vec<String>,
    bytes: Vec<u8>,
}

const OF_PATH: std::ops::Range<usize> = 1..5;
const FIELD_LEN: usize = 6;

impl FieldDigests {
    /// Of a request to `method` and `path`, by the fields of its outermost object.
    ///
    /// # Panics
    /// As [`Fingerprint::new`].
    pub fn new(method: &str, path: &str, request: &impl Serialize) -> Self {
        let fields = match serde_json::to_value(request) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let mut bytes = vec![VERSION];
        let place = Sha256::digest(format!("{method}\n{path}"));
        bytes.extend(&place[..OF_PATH.len()]);
        let mut names: Vec<_> = fields.keys().cloned().collect();
        names.sort_unstable();
        for name in &names {
            let value = serde_json_canonicalizer::to_vec(&fields[name])
                .expect("a value is plain data and always has a canonical form");
            let mut hash = Sha256::new();
            hash.update((name.len() as u64).to_be_bytes());
            hash.update(name.as_bytes());
            hash.update(&value);
            bytes.extend(&hash.finalize()[..FIELD_LEN]);
        }
        Self { names, bytes }
    }

    /// For the `field_digests` column.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The names of the fields that differ from those of a column; `path` alone
    /// where it is another operation. `None` where the two cannot be compared.
    #[must_use]
    pub fn differs(&self, stored: &[u8]) -> Option<Vec<String>> {
        if stored.first() != self.bytes.first() {
            return None;
        }
        if stored.get(OF_PATH) != self.bytes.get(OF_PATH) {
            return Some(vec!["path".to_owned()]);
        }
        if stored.len() != self.bytes.len() {
            return None;
        }
        let (ours, theirs) = (&self.bytes[OF_PATH.end..], &stored[OF_PATH.end..]);
        let pairs = ours.chunks(FIELD_LEN).zip(theirs.chunks(FIELD_LEN));
        let differing = self.names.iter().zip(pairs).filter(|(_, (a, b))| a != b);
        Some(differing.map(|(name, _)| name.clone()).collect())
    }
}

impl fmt::Debug for FieldDigests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FieldDigests({} fields)", self.names.len())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint(v{})", self.0[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    #[test]
    fn the_order_of_fields_makes_no_difference() {
        let one: Value = serde_json::from_str(r#"{"a":1,"b":{"x":"1","y":"2"}}"#).unwrap();
        let other: Value = serde_json::from_str(r#"{ "b": {"y":"2", "x":"1"}, "a": 1 }"#).unwrap();
        assert_eq!(
            Fingerprint::new("POST", "/v1/charges", &one),
            Fingerprint::new("POST", "/v1/charges", &other)
        );
    }

    #[test]
    fn method_path_and_request_all_count() {
        let base = Fingerprint::new("POST", "/v1/charges", &json!({"a": 1}));
        assert_ne!(
            base,
            Fingerprint::new("PUT", "/v1/charges", &json!({"a": 1}))
        );
        assert_ne!(
            base,
            Fingerprint::new("POST", "/v1/refunds", &json!({"a": 1}))
        );
        assert_ne!(
            base,
            Fingerprint::new("POST", "/v1/charges", &json!({"a": 2}))
        );
    }

    /// The stored hashes of a running deployment depend on it: a change here
    /// needs a new version, not a new expectation.
    #[test]
    fn version_1_stays_what_it_is() {
        let fingerprint = Fingerprint::new(
            "POST",
            "/v1/charges",
            &json!({"amount": 5000, "currency": "usd"}),
        );
        let mut expected = vec![1];
        expected.extend(Sha256::digest(
            b"\x01POST\n/v1/charges\n{\"amount\":5000,\"currency\":\"usd\"}",
        ));
        assert_eq!(fingerprint.as_bytes(), expected);
    }

    #[test]
    fn another_version_is_not_compared() {
        let mut bytes = *Fingerprint::new("POST", "/", &json!({}))
            .as_bytes()
            .first_chunk::<33>()
            .unwrap();
        assert!(Fingerprint::from_column(&bytes).unwrap().is_comparable());
        bytes[0] = 2;
        assert!(!Fingerprint::from_column(&bytes).unwrap().is_comparable());
        assert_eq!(Fingerprint::from_column(&bytes[1..]), None);
    }

    #[test]
    fn what_differs_is_named() {
        let digests = |path: &str, request: Value| FieldDigests::new("POST", path, &request);
        let stored = digests("/v1/charges", json!({"b": 1, "a": "x", "c": null}));
        let differs = |other: FieldDigests| other.differs(stored.as_bytes());
        let same = digests("/v1/charges", json!({"a": "x", "b": 1, "c": null}));
        assert_eq!(differs(same), Some(vec![]));
        let other = digests("/v1/charges", json!({"a": "y", "b": 1, "c": 0}));
        assert_eq!(differs(other), Some(vec!["a".to_owned(), "c".to_owned()]));
        let elsewhere = digests("/v1/refunds", json!({"a": "x", "b": 1, "c": null}));
        assert_eq!(differs(elsewhere), Some(vec!["path".to_owned()]));
        let newer = digests("/v1/charges", json!({"a": "x", "b": 1, "c": null, "d": 1}));
        assert_eq!(differs(newer), None);
        assert_eq!(stored.differs(&[]), None);
        assert_eq!(stored.differs(&[9; 23]), None);
    }

    proptest! {
        #[test]
        fn two_requests_share_one_only_if_they_are_equal(
            a in proptest::collection::btree_map("[a-z]{1,3}", "[ -~]{0,5}", 0..4),
            b in proptest::collection::btree_map("[a-z]{1,3}", "[ -~]{0,5}", 0..4),
        ) {
            let shuffled: Map<String, Value> =
                a.iter().rev().map(|(k, v)| (k.clone(), json!(v))).collect();
            let of_a = Fingerprint::new("POST", "/p", &a);
            prop_assert_eq!(of_a, Fingerprint::new("POST", "/p", &shuffled));
            prop_assert_eq!(a == b, of_a == Fingerprint::new("POST", "/p", &b));
        }
    }
}
