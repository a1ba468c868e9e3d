//! The idempotency key: the client's name for one operation.

use std::fmt::{self, Write};

/// The longest key, in characters; also the width of its column.
pub const KEY_MAX: usize = 255;

/// 1 to [`KEY_MAX`] visible ASCII characters.
///
/// Two spellings in the header name the same key: the bare one that Stripe's
/// clients send, and the quoted string (RFC 8941) of the IETF draft
/// *The Idempotency-Key HTTP Header Field*.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

/// Why a header is not a key. The key itself is not repeated: it may carry
/// what a log should not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedKey {
    /// Nothing, or nothing between the quotes.
    #[error("Idempotency-Key is empty")]
    Empty,
    /// More than [`KEY_MAX`] characters.
    #[error("Idempotency-Key is longer than {KEY_MAX} characters")]
    TooLong,
    /// Spaces, control characters, or anything beyond ASCII.
    #[error("Idempotency-Key may hold visible ASCII characters only")]
    NotVisibleAscii,
    /// A quote without its partner, or an escape that RFC 8941 does not know.
    #[error("Idempotency-Key begins with a quote but is no quoted string")]
    BadQuoting,
    /// The header stands in the request twice.
    #[error("Idempotency-Key was sent more than once")]
    Repeated,
}

impl Key {
    /// From the header's value as it came.
    ///
    /// # Errors
    /// What is wrong with it, as [`MalformedKey`].
    pub fn from_header(value: &[u8]) -> Result<Self, MalformedKey> {
        let value = value.trim_ascii();
        let text = match value {
            [b'"', inner @ .., b'"'] => unescape(inner)?,
            [b'"', ..] => return Err(MalformedKey::BadQuoting),
            bare => bare.to_vec(),
        };
        let text = String::from_utf8(text).map_err(|_| MalformedKey::NotVisibleAscii)?;
        Self::from_text(text)
    }

    /// From the key itself, to which a quote is a character like any other.
    pub(crate) fn from_text(text: String) -> Result<Self, MalformedKey> {
        if text.is_empty() {
            return Err(MalformedKey::Empty);
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(MalformedKey::NotVisibleAscii);
        }
        if text.len() > KEY_MAX {
            return Err(MalformedKey::TooLong);
        }
        Ok(Self(text))
    }

    /// From all headers of the name, of which there may be one.
    ///
    /// # Errors
    /// What is wrong with it, as [`MalformedKey`].
    pub fn from_headers<'a>(
        mut values: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Option<Self>, MalformedKey> {
        let Some(value) = values.next() else {
            return Ok(None);
        };
        if values.next().is_some() {
            return Err(MalformedKey::Repeated);
        }
        Self::from_header(value).map(Some)
    }

    /// A key of the service's own, for what has none from a client. It holds a
    /// space, so that no client's key can ever be equal to it.
    pub(crate) fn internal(kind: &'static str, digest: &[u8]) -> Self {
        let mut text = format!("{kind} ");
        for byte in digest {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The key without quotes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As [`Key::from_header`] reads it: bare, or quoted where it begins with a
    /// quote itself.
    #[must_use]
    pub fn to_header(&self) -> String {
        if self.0.starts_with('"') {
            let escaped = self.0.replace('\\', "\\\\").replace('"', "\\\"");
            format!("\"{escaped}\"")
        } else {
            self.0.clone()
        }
    }
}

/// RFC 8941, section 4.2.5: within quotes only `\"` and `\\` are escapes.
fn unescape(inner: &[u8]) -> Result<Vec<u8>, MalformedKey> {
    let mut text = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'\\' => match bytes.next() {
                Some(&escaped @ (b'"' | b'\\')) => text.push(escaped),
                _ => return Err(MalformedKey::BadQuoting),
            },
            b'"' => return Err(MalformedKey::BadQuoting),
            other => text.push(other),
        }
    }
    Ok(text)
}

impl fmt::Debug for Key {
    /// Not the key itself: clients build keys from e-mail addresses and the like.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} characters)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(value: &str) -> Result<String, MalformedKey> {
        Key::from_header(value.as_bytes()).map(|key| key.0)
    }

    #[test]
    fn bare_and_quoted_are_the_same_key() {
        assert_eq!(
            key("order_12345_charge_attempt_1"),
            key("\"order_12345_charge_attempt_1\"")
        );
        assert_eq!(key(r#""a\"b\\c""#).as_deref(), Ok(r#"a"b\c"#));
        assert_eq!(key("  padded\t").as_deref(), Ok("padded"));
    }

    #[test]
    fn what_is_no_key_is_refused_by_its_reason() {
        use MalformedKey::{BadQuoting, Empty, NotVisibleAscii, TooLong};
        for (value, why) in [
            ("", Empty),
            ("  ", Empty),
            ("\"\"", Empty),
            ("\"", BadQuoting),
            ("\"open", BadQuoting),
            ("\"a\"b\"", BadQuoting),
            (r#""a\b""#, BadQuoting),
            (r#""a\""#, BadQuoting),
            ("two words", NotVisibleAscii),
            ("\"two words\"", NotVisibleAscii),
            ("tab\there", NotVisibleAscii),
            ("schlüssel", NotVisibleAscii),
        ] {
            assert_eq!(key(value), Err(why), "{value:?}");
        }
        assert!(key(&"k".repeat(KEY_MAX)).is_ok());
        assert_eq!(key(&"k".repeat(KEY_MAX + 1)), Err(TooLong));
        assert!(key(&format!("\"{}\"", "k".repeat(KEY_MAX))).is_ok());
    }

    proptest! {
        #[test]
        fn every_visible_key_survives_quoting(text in "[!-~]{1,255}") {
            let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
            prop_assert_eq!(key(&quoted), Ok(text.clone()));
            let parsed = Key::from_header(quoted.as_bytes()).unwrap();
            prop_assert_eq!(Key::from_header(parsed.to_header().as_bytes()), Ok(parsed));
            if !text.starts_with('"') {
                prop_assert_eq!(key(&text), Ok(text));
            }
        }

        #[test]
        fn no_header_panics(value in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Key::from_header(&value);
        }
    }
}
