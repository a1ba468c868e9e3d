//! The fingerprint: what a request means, in 33 bytes.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// The version that new fingerprints carry in their first byte.
///
/// A release that changes what goes into the hash raises it and keeps the
/// old computation beside the new one, for good: charges and refunds carry the
/// fingerprint of their request for as long as they are there, and an honest
/// retry that arrives after an upgrade must not become a 422.
const VERSION: u8 = 2;

/// A typed request that fingerprints are taken of.
///
/// Its JSON leaves out what the client left out, and what the client set to the
/// default (`skip_serializing_if`). So a release that adds an optional field
/// changes the fingerprint of no request that does not use it.
pub trait Fingerprinted: Serialize {
    /// The fields that can be left out, with what version 1 wrote for them then;
    /// `None` for a field that is younger than version 1.
    const OPTIONAL: &'static [(&'static str, Option<Blank>)];
}

/// What version 1 wrote for a field that was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blank {
    /// `null`
    Null,
    /// `false`
    False,
    /// `true`
    True,
    /// `{}`
    EmptyObject,
}

impl Blank {
    fn value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::False => Value::Bool(false),
            Self::True => Value::Bool(true),
            Self::EmptyObject => Value::Object(Map::new()),
        }
    }
}

/// SHA-256 over version, method, path and the typed request as canonical JSON
/// (RFC 8785), behind one byte of version.
///
/// It is taken from the parsed request and not from its bytes, so the order of
/// fields, white space, and JSON or form make no difference; another path does.
///
/// | version | what was left out |
/// | --- | --- |
/// | 1 | is written: `null`, `{}`, or the default |
/// | 2 | is left out ([`Fingerprinted`]) |
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 33]);

impl Fingerprint {
    /// Of a request to `method` and `path`.
    ///
    /// # Panics
    /// If `request` cannot be written as JSON, which no type of ours can bring
    /// about: they hold strings, integers, booleans and maps keyed by strings.
    pub fn new(method: &str, path: &str, request: &impl Serialize) -> Self {
        Self::hash(VERSION, &place(method, path), request)
    }

    /// The same by the rule of version 1, for keys that are made of a request:
    /// such a key has to be the same before and after an upgrade, and on replicas
    /// of both releases while it is rolled out.
    ///
    /// # Panics
    /// As [`Fingerprint::new`].
    pub fn version_1<R: Fingerprinted>(method: &str, path: &str, request: &R) -> Self {
        Self::hash(1, &place(method, path), &version_1_fields(request))
    }

    /// By the rule of version 1, of something that has no fields to be left out.
    ///
    /// # Panics
    /// As [`Fingerprint::new`].
    pub(crate) fn version_1_of(method: &str, path: &str, what: &impl Serialize) -> Self {
        Self::hash(1, &place(method, path), what)
    }

    fn hash(version: u8, place: &str, request: &impl Serialize) -> Self {
        let canonical = serde_json_canonicalizer::to_vec(request)
            .expect("a typed request is plain data and always has a canonical form");
        let mut hash = Sha256::new();
        hash.update([version]);
        hash.update(place.as_bytes());
        // Neither a method nor a path can contain a line feed, so no two
        // requests run together to the same bytes.
        hash.update(b"\n");
        hash.update(&canonical);
        let mut bytes = [version; 33];
        bytes[1..].copy_from_slice(&hash.finalize());
        Self(bytes)
    }

    /// For a key that stands for the same thing whatever comes with it.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self::new("", "", &())
    }

    /// From a `request_hash` column; `None` if it has another length, or a
    /// version that never was.
    #[must_use]
    pub fn from_column(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 33] = bytes.try_into().ok()?;
        (bytes[0] > 0).then_some(Self(bytes))
    }

    /// For the `request_hash` column.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// By which rule it was computed. This release computes those up to its own
    /// ([`FieldDigests::by_version`]); a row of a newer one, met in the middle of
    /// a rollout, can be neither replayed nor refused: which of the two would be a
    /// guess.
    #[must_use]
    pub fn version(&self) -> u8 {
        self.0[0]
    }
}

fn place(method: &str, path: &str) -> String {
    format!("{method}\n{path}")
}

fn fields(request: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(request) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// As version 1 wrote it. A field that came later and is set stays: version 1
/// could not have said it, so no row of that version is equal to this.
fn version_1_fields<R: Fingerprinted>(request: &R) -> Map<String, Value> {
    let mut fields = fields(request);
    for (name, blank) in R::OPTIONAL {
        if let Some(blank) = blank {
            fields.entry(*name).or_insert_with(|| Blank::value(*blank));
        }
    }
    fields
}

/// A digest per field of a request, to tell somebody who uses a key again what
/// differs from the first time, without keeping what it was.
///
/// One byte of version, four of the digest of method and path, then for each
/// field that was sent, in the order of their names, three bytes that stand for
/// its name and six of the digest of its value. Version 1 had no names, and all
/// fields: two of them are compared only where they have the same form.
#[derive(Clone, PartialEq, Eq)]
pub struct FieldDigests {
    place: Box<str>,
    /// Of the fields that stand in `bytes`, in their order.
    names: Vec<String>,
    /// The fields that may be missing there.
    optional: &'static [(&'static str, Option<Blank>)],
    bytes: Vec<u8>,
}

const OF_PATH: std::ops::Range<usize> = 1..5;
const NAME_LEN: usize = 3;
const DIGEST_LEN: usize = 6;

impl FieldDigests {
    /// Of a request to `method` and `path`, by the fields of its outermost object.
    ///
    /// # Panics
    /// As [`Fingerprint::new`].
    pub fn new<R: Fingerprinted>(method: &str, path: &str, request: &R) -> Self {
        Self::of(
            VERSION,
            place(method, path).into(),
            R::OPTIONAL,
            &fields(request),
        )
    }

    /// The fingerprint and the digests of the same request by the rule of
    /// `version`; `None` if that is newer than this release.
    ///
    /// # Panics
    /// As [`Fingerprint::new`].
    pub fn by_version<R: Fingerprinted>(
        &self,
        version: u8,
        request: &R,
    ) -> Option<(Fingerprint, Self)> {
        let fields = match version {
            1 => version_1_fields(request),
            VERSION => fields(request),
            _ => return None,
        };
        let fingerprint = Fingerprint::hash(version, &self.place, &fields);
        let digests = Self::of(version, self.place.clone(), self.optional, &fields);
        Some((fingerprint, digests))
    }

    fn of(
        version: u8,
        place: Box<str>,
        optional: &'static [(&'static str, Option<Blank>)],
        fields: &Map<String, Value>,
    ) -> Self {
        let mut bytes = vec![version];
        bytes.extend(&Sha256::digest(place.as_bytes())[..OF_PATH.len()]);
        let mut names: Vec<_> = fields.keys().cloned().collect();
        names.sort_unstable();
        for name in &names {
            let value = serde_json_canonicalizer::to_vec(&fields[name])
                .expect("a value is plain data and always has a canonical form");
            let mut hash = Sha256::new();
            hash.update((name.len() as u64).to_be_bytes());
            hash.update(name.as_bytes());
            hash.update(&value);
            if version > 1 {
                bytes.extend(tag(name));
            }
            bytes.extend(&hash.finalize()[..DIGEST_LEN]);
        }
        Self {
            place,
            names,
            optional,
            bytes,
        }
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
        let (ours, theirs) = (&self.bytes[OF_PATH.end..], &stored[OF_PATH.end..]);
        if stored[0] == 1 {
            return self.differs_in_place(ours, theirs);
        }
        let (ours, theirs) = (Sent::read(ours)?, Sent::read(theirs)?);
        let mut names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        names.extend(self.optional.iter().map(|(name, _)| *name));
        names.sort_unstable();
        names.dedup();
        // A field of a newer release's, that this one has no name for.
        if theirs
            .tags()
            .any(|theirs| names.iter().all(|name| tag(name) != theirs))
        {
            return None;
        }
        let differing = names
            .into_iter()
            .filter(|name| ours.digest(tag(name)) != theirs.digest(tag(name)));
        Some(differing.map(str::to_owned).collect())
    }

    /// Version 1: the same fields in the same order.
    fn differs_in_place(&self, ours: &[u8], theirs: &[u8]) -> Option<Vec<String>> {
        if ours.len() != theirs.len() {
            return None;
        }
        let pairs = ours.chunks(DIGEST_LEN).zip(theirs.chunks(DIGEST_LEN));
        let differing = self.names.iter().zip(pairs).filter(|(_, (a, b))| a != b);
        Some(differing.map(|(name, _)| name.clone()).collect())
    }
}

/// What stands for a field's name.
fn tag(name: &str) -> [u8; NAME_LEN] {
    let digest = Sha256::digest(name.as_bytes());
    [digest[0], digest[1], digest[2]]
}

/// The fields that were sent, as they stand in a column.
struct Sent<'a>(&'a [[u8; NAME_LEN + DIGEST_LEN]]);

impl<'a> Sent<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (fields, rest) = bytes.as_chunks();
        rest.is_empty().then_some(Self(fields))
    }

    fn tags(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|field| &field[..NAME_LEN])
    }

    fn digest(&self, tag: [u8; NAME_LEN]) -> Option<&[u8]> {
        let field = self.0.iter().find(|field| field[..NAME_LEN] == tag)?;
        Some(&field[NAME_LEN..])
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
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use crate::{
        changes::CaptureRequest,
        charges::{ChargeRequest, ChargeUpdate},
        ids::ChargeId,
        money::{Amount, Currency},
        refunds::{Reason, RefundRequest},
    };

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
    fn version_2_stays_what_it_is() {
        let fingerprint = Fingerprint::new(
            "POST",
            "/v1/charges",
            &json!({"amount": 5000, "currency": "usd"}),
        );
        let mut expected = vec![2];
        expected.extend(Sha256::digest(
            b"\x02POST\n/v1/charges\n{\"amount\":5000,\"currency\":\"usd\"}",
        ));
        assert_eq!(fingerprint.as_bytes(), expected);
    }

    /// A request with the canonical forms that versions 2 and 1 hash, and the
    /// hash of version 2 as it stands in the tables.
    fn assert_pinned<R: Fingerprinted>(request: &R, path: &str, forms: [&str; 2], hash: &str) {
        let digests = FieldDigests::new("POST", path, request);
        for (version, form) in [(2, forms[0]), (1, forms[1])] {
            let mut expected = vec![version];
            let mut input = vec![version];
            input.extend(format!("POST\n{path}\n{form}").bytes());
            expected.extend(Sha256::digest(&input));
            let (fingerprint, digests) = digests.by_version(version, request).unwrap();
            assert_eq!(
                fingerprint.as_bytes(),
                expected,
                "version {version}: {form}"
            );
            assert_eq!(digests.as_bytes()[0], version);
        }
        let current = Fingerprint::new("POST", path, request);
        let hash_bytes: Vec<u8> = (0..hash.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&hash[i..i + 2], 16).unwrap())
            .collect();
        assert_eq!(current.as_bytes(), hash_bytes, "{path} {}", forms[0]);
        assert_eq!(
            digests.by_version(2, request),
            Some((current, digests.clone()))
        );
        assert_eq!(digests.by_version(3, request), None);
    }

    /// The real requests: whoever adds a field to one of them sees here that what
    /// does not use it keeps its hash.
    #[test]
    fn requests_keep_their_hashes() {
        let amount = Amount::new(5000).unwrap();
        let metadata = BTreeMap::from([("order".to_owned(), "7".to_owned())]);
        let least = ChargeRequest::new(amount, Currency::from_code("usd").unwrap());
        assert_pinned(
            &least,
            "/v1/charges",
            [
                r#"{"amount":5000,"currency":"usd"}"#,
                r#"{"amount":5000,"capture":true,"currency":"usd","customer":null,"description":null,"metadata":{},"source":null}"#,
            ],
            "02c31f5ce9cd6f4b953b7e17c56dc84c1a9fbca14a92ce92163845986372219471",
        );
        let most = ChargeRequest {
            customer: Some("cus_ABC123".to_owned()),
            source: Some("tok_visa".to_owned()),
            description: Some("a teapot".to_owned()),
            metadata: metadata.clone(),
            capture: false,
            ..least
        };
        let form = r#"{"amount":5000,"capture":false,"currency":"usd","customer":"cus_ABC123","description":"a teapot","metadata":{"order":"7"},"source":"tok_visa"}"#;
        assert_pinned(
            &most,
            "/v1/charges",
            [form; 2],
            "02cf27fb86ae62a36a3c3ca3bd45789e496f9ce322dd4d884f6f5b4268f9c57171",
        );

        let charge: ChargeId = "ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e".parse().unwrap();
        let refund = RefundRequest {
            charge,
            amount: None,
            reason: None,
            metadata: BTreeMap::new(),
        };
        assert_pinned(
            &refund,
            "/v1/refunds",
            [
                r#"{"charge":"ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e"}"#,
                r#"{"amount":null,"charge":"ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e","metadata":{},"reason":null}"#,
            ],
            "02b63dfde88241688c9418b986180f885dda7554f2215cd076ed3c73af82193e94",
        );
        let refund = RefundRequest {
            amount: Some(amount),
            reason: Some(Reason::RequestedByCustomer),
            metadata: metadata.clone(),
            ..refund
        };
        let form = r#"{"amount":5000,"charge":"ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e","metadata":{"order":"7"},"reason":"requested_by_customer"}"#;
        assert_pinned(
            &refund,
            "/v1/refunds",
            [form; 2],
            "02f8613e4962acad7218340cd988b50b6e73aa9b51813728179da36e7a9029ef4c",
        );

        let path = "/v1/charges/ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e/capture";
        let capture = CaptureRequest { amount: None };
        assert_pinned(
            &capture,
            path,
            ["{}", r#"{"amount":null}"#],
            "022b6cdbb7b06fdedfcf6ce589f2227a0b839b7b2a35d0bcddba0b95f576c176e6",
        );
        let capture = CaptureRequest {
            amount: Some(amount),
        };
        assert_pinned(
            &capture,
            path,
            [r#"{"amount":5000}"#; 2],
            "02e3fa4e9b8e8ccf120c2dfead72c43124abc87303b9c70020e2d9ea63b95da388",
        );

        let path = "/v1/charges/ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e";
        let update = ChargeUpdate {
            description: None,
            metadata: BTreeMap::new(),
            clears_metadata: false,
        };
        let form = r#"{"clears_metadata":false,"description":null,"metadata":{}}"#;
        assert_pinned(
            &update,
            path,
            ["{}", form],
            "029a6048c47b27de1434c66f711210f6cca11ed9eb29fe35d68914e7b295d59aa9",
        );
        let update = ChargeUpdate {
            description: Some(String::new()),
            metadata,
            clears_metadata: true,
        };
        let form = r#"{"clears_metadata":true,"description":"","metadata":{"order":"7"}}"#;
        assert_pinned(
            &update,
            path,
            [form; 2],
            "028410206c6d8227480c3e7298f37351b2cbdf148bc666d44344709ea6e263df1e",
        );
    }

    /// A request of a release that has a field more.
    #[derive(Serialize)]
    struct Later {
        amount: i64,
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        place: Option<&'static str>,
    }

    impl Fingerprinted for Later {
        const OPTIONAL: &'static [(&'static str, Option<Blank>)] =
            &[("note", Some(Blank::Null)), ("place", None)];
    }

    /// The same request before.
    #[derive(Serialize)]
    struct Before {
        amount: i64,
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<&'static str>,
    }

    impl Fingerprinted for Before {
        const OPTIONAL: &'static [(&'static str, Option<Blank>)] = &[("note", Some(Blank::Null))];
    }

    #[test]
    fn a_new_field_changes_nothing_for_those_who_do_not_use_it() {
        let before = Before {
            amount: 1,
            note: None,
        };
        let later = |place| Later {
            amount: 1,
            note: None,
            place,
        };
        let of_before = FieldDigests::new("POST", "/p", &before);
        for version in [1, 2] {
            let stored = of_before.by_version(version, &before).unwrap();
            let by_version = |request: &Later| {
                FieldDigests::new("POST", "/p", request)
                    .by_version(version, request)
                    .unwrap()
            };
            assert_eq!(by_version(&later(None)).0, stored.0, "version {version}");
            let other = by_version(&later(Some("here")));
            assert_ne!(other.0, stored.0, "version {version}");
        }
        let digests = |place| FieldDigests::new("POST", "/p", &later(place));
        let place = || Some(vec!["place".to_owned()]);
        assert_eq!(digests(Some("here")).differs(of_before.as_bytes()), place());
        let with_place = digests(Some("here"));
        assert_eq!(digests(None).differs(with_place.as_bytes()), place());
        assert_eq!(
            digests(Some("there")).differs(with_place.as_bytes()),
            place()
        );
        // The release before has no name for it.
        assert_eq!(of_before.differs(with_place.as_bytes()), None);
        assert_eq!(of_before.differs(digests(None).as_bytes()), Some(vec![]));
    }

    #[test]
    fn a_column_that_no_release_wrote_is_none() {
        let mut bytes = *Fingerprint::new("POST", "/", &json!({}))
            .as_bytes()
            .first_chunk::<33>()
            .unwrap();
        bytes[0] = 9;
        assert_eq!(Fingerprint::from_column(&bytes).unwrap().version(), 9);
        bytes[0] = 0;
        assert_eq!(Fingerprint::from_column(&bytes), None);
        assert_eq!(Fingerprint::from_column(&bytes[1..]), None);
    }

    #[test]
    fn what_differs_is_named() {
        let request = |customer: Option<&str>, capture| ChargeRequest {
            customer: customer.map(str::to_owned),
            capture,
            ..ChargeRequest::new(Amount::new(1).unwrap(), Currency::from_code("usd").unwrap())
        };
        let stored = request(Some("cus_1"), true);
        for version in [1, 2] {
            let digests = |path: &str, request: &ChargeRequest| {
                let current = FieldDigests::new("POST", path, request);
                current.by_version(version, request).unwrap().1
            };
            let column = digests("/v1/charges", &stored);
            let differs = |request: &ChargeRequest| {
                digests("/v1/charges", request).differs(column.as_bytes())
            };
            assert_eq!(differs(&stored), Some(vec![]));
            assert_eq!(
                differs(&request(Some("cus_2"), false)),
                Some(vec!["capture".to_owned(), "customer".to_owned()])
            );
            assert_eq!(
                differs(&request(None, true)),
                Some(vec!["customer".to_owned()])
            );
            let elsewhere = digests("/v1/refunds", &stored);
            assert_eq!(
                elsewhere.differs(column.as_bytes()),
                Some(vec!["path".to_owned()])
            );
            for broken in [&[][..], &[9; 23], &column.as_bytes()[..20]] {
                assert_eq!(column.differs(broken), None, "{broken:?}");
            }
            let other = digests("/v1/charges", &stored).by_version(3 - version, &stored);
            assert_eq!(column.differs(other.unwrap().1.as_bytes()), None);
        }
    }

    #[test]
    fn no_two_fields_have_one_tag() {
        for fields in [
            ChargeRequest::OPTIONAL,
            RefundRequest::OPTIONAL,
            CaptureRequest::OPTIONAL,
            ChargeUpdate::OPTIONAL,
        ] {
            let names = fields.iter().map(|(name, _)| *name);
            let mut tags: Vec<_> = names.chain(["amount", "currency", "charge"]).collect();
            tags.sort_unstable();
            tags.dedup();
            let all = tags.len();
            let tags: std::collections::BTreeSet<_> = tags.into_iter().map(tag).collect();
            assert_eq!(tags.len(), all);
        }
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
