//! Blanking secrets in what a program prints, also when a value arrives in pieces.

/// What stands in place of a secret's value.
const BLANK: &[u8] = b"***";

/// Replaces the values of secrets. Of a value with several lines, each line of some length counts too, because
/// programs print such values line by line.
#[derive(Debug, Clone, Default)]
pub struct Redactor {
    /// Longest first, so that a value that contains another one is blanked whole.
    values: Vec<Vec<u8>>,
}

impl Redactor {
    const SHORTEST_LINE: usize = 8;

    pub fn new(values: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for value in values {
            let value = value.as_ref().trim_ascii();
            let lines = value.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
            all.extend(lines.filter(|l| l.len() >= Self::SHORTEST_LINE).map(<[u8]>::to_vec));
            all.push(value.to_vec());
        }
        all.retain(|value| !value.is_empty());
        all.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        all.dedup();
        Self { values: all }
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Blanks a whole text.
    pub fn text(&self, text: &str) -> String {
        if self.is_empty() {
            return text.to_owned();
        }
        let mut out = Vec::with_capacity(text.len());
        let mut stream = self.stream();
        stream.push(text.as_bytes(), &mut out);
        stream.finish(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Blanks a text that comes in pieces.
    pub fn stream(&self) -> RedactedStream<'_> {
        RedactedStream { values: &self.values, held: Vec::new() }
    }
}

/// Holds back only what could still turn out to be the beginning of a secret.
#[derive(Debug)]
pub struct RedactedStream<'a> {
    values: &'a [Vec<u8>],
    held: Vec<u8>,
}

impl RedactedStream<'_> {
    pub fn push(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        self.held.extend_from_slice(piece);
        let mut at = 0;
        while at < self.held.len() {
            let rest = &self.held[at..];
            let undecided = self.values.iter().any(|v| v.len() > rest.len() && v.starts_with(rest));
            if undecided {
                break;
            }
            match self.values.iter().find(|v| rest.starts_with(v)) {
                Some(value) => {
                    out.extend_from_slice(BLANK);
                    at += value.len();
                }
                None => {
                    out.push(rest[0]);
                    at += 1;
                }
            }
        }
        self.held.drain(..at);
    }

    /// Lets go of what was held back: it did not become a longer secret, but may hold a shorter one.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        while !self.held.is_empty() {
            let length = match self.values.iter().find(|v| self.held.starts_with(v)) {
                Some(value) => {
                    out.extend_from_slice(BLANK);
                    value.len()
                }
                None => {
                    out.push(self.held[0]);
                    1
                }
            };
            self.held.drain(..length);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blanks_values_and_the_lines_of_long_ones() {
        let redactor = Redactor::new(["hunter2", "hunter2-and-more", "line one of key\nline two of key", " "]);
        assert_eq!(redactor.text("pw hunter2, or hunter2-and-more."), "pw ***, or ***.");
        assert_eq!(redactor.text("got line two of key"), "got ***");
        assert_eq!(redactor.text("hunter2-and-mor"), "***-and-mor");
    }

    proptest! {
        #[test]
        fn pieces_give_the_same_as_the_whole(text in "[ab]{0,60}", cuts in prop::collection::vec(0usize..60, 0..8)) {
            let redactor = Redactor::new(["abba", "abb", "bbbbb"]);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.sort_unstable();
            let (mut stream, mut out, mut from) = (redactor.stream(), Vec::new(), 0);
            for cut in cuts.into_iter().chain([text.len()]) {
                stream.push(&text.as_bytes()[from..cut], &mut out);
                from = cut;
            }
            stream.finish(&mut out);
            let out = String::from_utf8(out).unwrap();
            prop_assert_eq!(&out, &redactor.text(&text));
            prop_assert!(!out.contains("abb"));
        }
    }
}
