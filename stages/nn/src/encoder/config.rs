//! The `config.json` of a BERT and of what was made from it without changing the arithmetic (RoBERTa, XLM-R).

use std::{fs, path::Path};

use serde::Deserialize;

use crate::Error;

/// The shape of a BERT and the constants of its arithmetic.
#[derive(Debug, Clone, PartialEq)]
pub struct BertConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub activation: Activation,
    /// Rows of the position matrix.
    pub positions: usize,
    /// The position of a text's first token.
    pub first_position: usize,
    pub token_types: usize,
    pub layer_norm_eps: f32,
}

/// What stands between the two products of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·Φ(x), by the error function.
    Gelu,
    /// Its approximation by the hyperbolic tangent.
    GeluTanh,
    Relu,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    hidden_act: String,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    pad_token_id: Option<usize>,
    position_embedding_type: Option<String>,
}

fn two() -> usize {
    2
}

fn layer_norm_eps() -> f64 {
    1e-12
}

/// Architectures whose arithmetic is BERT's, and whether their positions begin after the padding token's number.
const KNOWN: [(&str, bool); 4] = [("bert", false), ("roberta", true), ("xlm-roberta", true), ("camembert", true)];

const HELP: &str = "encoders that run here: Qwen3-Embedding, BERT, RoBERTa and XLM-R (MiniLM, BGE, E5, GTE-base and \
                    the like); others can be asked through an `endpoint`";

/// The name of the position matrix.
pub(super) const POSITIONS: &str = "embeddings.position_embeddings.weight";

impl BertConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// The file is missing or not JSON, names another architecture, or asks for something that is not computed here.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        Self::parse(&text).map_err(|message| Error::model(&path, message).help(HELP))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let raw: Raw = serde_json::from_str(text).map_err(|e| format!("not a BERT configuration: {e}"))?;
        let Some((_, offset)) = KNOWN.iter().find(|(name, _)| *name == raw.model_type) else {
            return Err(format!("unknown architecture `{}`", raw.model_type));
        };
        if let Some(kind) = raw.position_embedding_type.filter(|kind| kind != "absolute") {
            return Err(format!("`position_embedding_type` is {kind}"));
        }
        let activation = match raw.hidden_act.as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(format!("`hidden_act` is {other}")),
        };
        let sizes = [
            ("vocab_size", raw.vocab_size),
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", raw.num_attention_heads),
            ("type_vocab_size", raw.type_vocab_size),
        ];
        if let Some((name, size)) = sizes.iter().find(|(_, size)| *size == 0 || *size > 1 << 28) {
            return Err(format!("`{name}` is {size}"));
        }
        if !raw.hidden_size.is_multiple_of(raw.num_attention_heads) {
            let (width, heads) = (raw.hidden_size, raw.num_attention_heads);
            return Err(format!("a width of {width} cannot be shared out over {heads} attention heads"));
        }
        let first_position = if *offset { raw.pad_token_id.unwrap_or(1) + 1 } else { 0 };
        if raw.max_position_embeddings <= first_position || raw.max_position_embeddings > 1 << 28 {
            return Err(format!("`max_position_embeddings` is {}", raw.max_position_embeddings));
        }
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            activation,
            positions: raw.max_position_embeddings,
            first_position,
            token_types: raw.type_vocab_size,
            layer_norm_eps: raw.layer_norm_eps as f32,
        })
    }

    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// The longest text, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.positions - self.first_position
    }

    /// Whether the model can take a text.
    ///
    /// # Errors
    /// A text is longer than the model's positions, or has a token that the model has not.
    pub fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let (size, limit) = (self.vocab_size, self.max_tokens());
        if let Some(token) = tokens.iter().find(|t| **t as usize >= size) {
            return Err(Error::argument(format!("token {token} is not among the model's {size}"))
                .help("tokenizer.json and config.json are of different models"));
        }
        if tokens.len() > limit {
            let count = tokens.len();
            return Err(Error::argument(format!("a text of {count} tokens, and the model has {limit} positions")));
        }
        Ok(())
    }

    /// Every weight's name and shape, as Hugging Face files spell them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let norm = |name: &str| [(format!("{name}.weight"), vec![h]), (format!("{name}.bias"), vec![h])];
        let linear = |name: &str, out: usize, inner: usize| {
            [(format!("{name}.weight"), vec![out, inner]), (format!("{name}.bias"), vec![out])]
        };
        let mut all = vec![
            ("embeddings.word_embeddings.weight".to_owned(), vec![self.vocab_size, h]),
            (POSITIONS.to_owned(), vec![self.positions, h]),
            ("embeddings.token_type_embeddings.weight".to_owned(), vec![self.token_types, h]),
        ];
        all.extend(norm("embeddings.LayerNorm"));
        for layer in 0..self.layers {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            for part in ["query", "key", "value"] {
                all.extend(linear(&name(&format!("attention.self.{part}")), h, h));
            }
            all.extend(linear(&name("attention.output.dense"), h, h));
            all.extend(norm(&name("attention.output.LayerNorm")));
            all.extend(linear(&name("intermediate.dense"), f, h));
            all.extend(linear(&name("output.dense"), h, f));
            all.extend(norm(&name("output.LayerNorm")));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINI_LM: &str = r#"{"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 30522,
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
        "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "pad_token_id": 0, "position_embedding_type": "absolute", "gradient_checkpointing": false}"#;

    #[test]
    fn published_configurations_are_read() {
        let config = BertConfig::parse(MINI_LM).unwrap();
        assert_eq!((config.head_dim(), config.max_tokens(), config.activation), (32, 512, Activation::Gelu));
        let text = MINI_LM.replace(r#""bert""#, r#""xlm-roberta""#).replace("512", "514");
        let config = BertConfig::parse(&text.replace(r#""pad_token_id": 0"#, r#""pad_token_id": 1"#)).unwrap();
        assert_eq!((config.first_position, config.max_tokens()), (2, 512));
        assert_eq!(config.tensors().len(), 5 + 6 * 16);
    }

    #[test]
    fn what_would_compute_something_else_is_refused() {
        for (from, to, words) in [
            (r#""bert""#, r#""deberta""#, "unknown architecture `deberta`"),
            ("absolute", "relative_key", "relative_key"),
            (r#""gelu""#, r#""swish""#, "swish"),
            (r#""num_attention_heads": 12"#, r#""num_attention_heads": 7"#, "7 attention heads"),
            (r#""vocab_size": 30522,"#, "", "missing field `vocab_size`"),
            (r#""num_hidden_layers": 6"#, r#""num_hidden_layers": 0"#, "`num_hidden_layers` is 0"),
        ] {
            let error = BertConfig::parse(&MINI_LM.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
