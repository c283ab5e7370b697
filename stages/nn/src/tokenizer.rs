//! Tokenizers in Hugging Face's format: read from a model folder, or made here for a model from scratch.
//!
//! Made ones are of two kinds: byte-level BPE learned on a text, and one token a word. What text is given to them, and
//! where special tokens stand in it, is the caller's business.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tokenizers::{
    AddedToken, Tokenizer as Inner,
    decoders::byte_level::ByteLevel as ByteLevelDecoder,
    models::{ModelWrapper, TrainerWrapper, bpe},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

use crate::Error;

/// Files beside `tokenizer.json` that belong to a tokenizer, where a folder has them.
const COMPANIONS: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Names of the special tokens of tokenizers that are made here.
pub mod special {
    /// Starts every sample of a byte-level tokenizer, and pads.
    pub const TEXT_START: &str = "<|endoftext|>";
    pub const TURN_START: &str = "<|im_start|>";
    pub const TURN_END: &str = "<|im_end|>";
    /// Starts every sample of a tokenizer of words.
    pub const WORDS_START: &str = "<s>";
    pub const WORDS_END: &str = "</s>";
    pub const WORDS_PAD: &str = "<pad>";
    pub const WORDS_UNKNOWN: &str = "<unk>";
}

/// ChatML, as Qwen3 has it, for models from scratch.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content \
     + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Inner,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Bytes,
    Words,
}

/// A token of an encoded text, and the bytes of the text that it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub token: u32,
    pub start: usize,
    pub end: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// The file is missing, or is not a tokenizer.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let mut inner = Inner::from_bytes(bytes).map_err(|e| {
            Error::model(&path, format!("not a tokenizer: {e}")).help("the file may be cut short; copy it again")
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::model(&path, e.to_string()))?;
        Ok(Self { inner, kind: Kind::Read })
    }

    /// Learns byte-level BPE (Sennrich et al. 2016) of at most `size` tokens on `texts`. Every text can be written in
    /// it. Square brackets are never joined with what stands beside them, so that a bracketed term always ends in
    /// the one token `]`.
    ///
    /// # Errors
    /// `size` has no room for the 256 bytes and the special tokens.
    pub fn learn<'a>(texts: impl Iterator<Item = &'a str> + Send, size: usize) -> Result<Self, Error> {
        let specials = [special::TEXT_START, special::TURN_START, special::TURN_END].map(|t| AddedToken::from(t, true));
        let think = ["<think>", "</think>"].map(|t| AddedToken::from(t, false));
        let least = 256 + specials.len() + think.len();
        if size < least {
            return Err(Error::argument(format!("a vocabulary of {size} tokens is too small"))
                .help(format!("bytes and special tokens alone are {least}")));
        }
        let mut inner = Inner::new(ModelWrapper::BPE(bpe::BPE::default()));
        let brackets = Split::new(SplitPattern::Regex(r" ?\[|\]".to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| Error::argument(e.to_string()))?;
        inner.with_pre_tokenizer(Some(Sequence::new(vec![
            PreTokenizerWrapper::Split(brackets),
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true)),
        ])));
        inner.with_decoder(Some(ByteLevelDecoder::new(false, false, true)));
        let mut trainer = TrainerWrapper::BpeTrainer(
            bpe::BpeTrainer::builder()
                .show_progress(false)
                .vocab_size(size - think.len())
                .min_frequency(2)
                .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                .special_tokens(specials.to_vec())
                .build(),
        );
        inner.train(&mut trainer, texts).map_err(|e| Error::argument(format!("cannot learn a tokenizer: {e}")))?;
        inner.add_tokens(think).map_err(|e| Error::argument(e.to_string()))?;
        Ok(Self { inner, kind: Kind::Bytes })
    }

    /// One token for each of `words`, in their order after the special ones; text is split at white space.
    ///
    /// # Errors
    /// A word stands there twice.
    pub fn of_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let specials = [special::WORDS_PAD, special::WORDS_START, special::WORDS_END, special::WORDS_UNKNOWN];
        let mut vocabulary = serde_json::Map::new();
        for (id, word) in specials.into_iter().chain(words).enumerate() {
            if vocabulary.insert(word.to_owned(), Value::from(id)).is_some() {
                return Err(Error::argument(format!("the word `{word}` stands in the vocabulary twice")));
            }
        }
        let added: Vec<Value> = specials
            .iter()
            .enumerate()
            .map(|(id, content)| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true,
                })
            })
            .collect();
        let text = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null,
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": special::WORDS_UNKNOWN},
        });
        let inner = Inner::from_bytes(text.to_string())
            .map_err(|e| Error::argument(format!("cannot make a tokenizer of words: {e}")))?;
        Ok(Self { inner, kind: Kind::Words })
    }

    /// Writes a tokenizer that was made here as `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text + "\n").map_err(|e| Error::io("write", path, e))
        };
        let text = self.inner.to_string(true).map_err(|e| Error::argument(e.to_string()))?;
        write("tokenizer.json", text)?;
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_input_names": ["input_ids", "attention_mask"],
        });
        let tokens = match self.kind {
            Kind::Words => [
                ("bos_token", special::WORDS_START),
                ("eos_token", special::WORDS_END),
                ("pad_token", special::WORDS_PAD),
                ("unk_token", special::WORDS_UNKNOWN),
            ]
            .as_slice(),
            Kind::Bytes => {
                [("eos_token", special::TURN_END), ("pad_token", special::TEXT_START), ("chat_template", CHAT_TEMPLATE)]
                    .as_slice()
            }
            Kind::Read => &[],
        };
        for (name, value) in tokens {
            config[*name] = json!(value);
        }
        write("tokenizer_config.json", serde_json::to_string_pretty(&config).unwrap_or_default())
    }

    /// Copies the files of the tokenizer of one model folder to another.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or a file cannot be copied.
    pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
        for (index, name) in COMPANIONS.iter().enumerate() {
            let path = from.join(name);
            // Read and written, not copied: permissions of a published folder (read-only) must not travel.
            match fs::read(&path) {
                Ok(bytes) => {
                    let target = to.join(name);
                    fs::write(&target, bytes).map_err(|e| Error::io("write", target, e))?;
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && index > 0 => {}
                Err(e) => return Err(Error::io("read", path, e)),
            }
        }
        Ok(())
    }

    /// The tokens of a text; special tokens that are spelled out in it are taken for what they are, and none are added.
    ///
    /// # Errors
    /// The tokenizer cannot take the text (a broken `tokenizer.json`).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], with each token's place in the text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_placed(&self, text: &str) -> Result<Vec<Placed>, Error> {
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let placed = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(placed.map(|(&token, &(start, end))| Placed { token, start, end }).collect())
    }

    /// The text of these tokens, special ones spelled out.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.inner.decode(tokens, false).map_err(failed)
    }

    /// The number of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that stands for words that are not in the vocabulary, where there is one.
    pub fn unknown(&self) -> Option<u32> {
        match self.inner.get_model() {
            ModelWrapper::WordLevel(model) => self.id(&model.unk_token),
            _ => None,
        }
    }

    /// Whether every word is one token.
    pub fn is_of_words(&self) -> bool {
        matches!(self.inner.get_model(), ModelWrapper::WordLevel(_))
    }

    /// One more than the greatest token: the least vocabulary of a model that goes with it.
    pub fn size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::argument(format!("the tokenizer cannot take a text: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Item text ID: [hair-mask, repair, argan, oil, c++] Title: A mask.\nItem text ID: [héllo, b]\n";

    #[test]
    fn every_text_can_be_written_in_bytes() {
        let tokenizer = Tokenizer::learn([TEXT, TEXT].into_iter(), 300).unwrap();
        assert!(tokenizer.size() <= 300);
        for text in [TEXT, "日本 \u{0} ~\r\n\t", "<|im_start|>user\n<|im_end|>"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
        let turn = tokenizer.encode("<|im_start|>a").unwrap();
        assert_eq!(turn[0], tokenizer.id(special::TURN_START).unwrap());
        let close = tokenizer.id("]").unwrap();
        let tokens = tokenizer.encode(TEXT).unwrap();
        assert_eq!(tokens.iter().filter(|&&t| t == close).count(), 2, "every bracket is a token of its own");
        assert!(Tokenizer::learn([TEXT].into_iter(), 100).is_err());
    }

    #[test]
    fn what_was_learned_is_the_same_each_time_and_after_reading() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let to = folder.path().join(name);
            fs::create_dir(&to).unwrap();
            Tokenizer::learn([TEXT, TEXT, "other words, other tokens"].into_iter(), 400).unwrap().save(&to).unwrap();
            fs::read_to_string(to.join("tokenizer.json")).unwrap()
        };
        assert_eq!(write("a"), write("b"));
        let read = Tokenizer::load(&folder.path().join("a")).unwrap();
        let copied = folder.path().join("c");
        fs::create_dir(&copied).unwrap();
        Tokenizer::copy(&folder.path().join("a"), &copied).unwrap();
        let again = Tokenizer::load(&copied).unwrap();
        assert_eq!(read.encode(TEXT).unwrap(), again.encode(TEXT).unwrap());
        assert!(copied.join("tokenizer_config.json").exists() && read.unknown().is_none());
    }

    #[test]
    fn a_word_is_a_token() {
        let tokenizer = Tokenizer::of_words(["a-b", "c", "d]"]).unwrap();
        assert!(tokenizer.is_of_words());
        assert_eq!(tokenizer.size(), 7);
        assert_eq!(tokenizer.encode("<s>a-b c\nd] x").unwrap(), [1, 4, 5, 6, 3]);
        assert_eq!(tokenizer.unknown(), Some(3));
        assert!(Tokenizer::of_words(["c", "c"]).is_err());
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        let read = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(read.encode("c a-b").unwrap(), [5, 4]);
        assert_eq!(read.decode(&[4, 5]).unwrap(), "a-b c");
    }

    #[test]
    fn places_are_bytes_of_the_text() {
        let tokenizer = Tokenizer::learn([TEXT].into_iter(), 261).unwrap();
        let text = "é [a] b";
        for placed in tokenizer.encode_placed(text).unwrap() {
            assert!(placed.end <= text.len() && placed.start <= placed.end);
        }
        assert_eq!(tokenizer.encode_placed(text).unwrap().last().unwrap().end, text.len());
    }

    #[test]
    fn a_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Tokenizer::load(folder.path()), Err(Error::Io { .. })));
        fs::write(folder.path().join("tokenizer.json"), "{\"version\": ").unwrap();
        assert!(matches!(Tokenizer::load(folder.path()), Err(Error::Model { .. })));
    }
}
