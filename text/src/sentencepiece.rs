//! SentencePiece-style BPE from pieces and scores, as a model for `tokenizers`.
//!
//! `tokenizers` wants a ranked list of merges, but SentencePiece ranks the *product* of a merge and
//! breaks ties from the left. A list of merges cannot say that (all splits of one product share a
//! score), so the scores are used directly.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};

use ahash::AHashMap;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

const SPACE: &str = "\u{2581}";
const NONE: u32 = u32::MAX;

pub struct SentencePiece {
    tokens: Vec<String>,
    ids: AHashMap<String, u32>,
    scores: Vec<f32>,
    /// False for tokens that text cannot spell: control, unknown and byte tokens.
    spellable: Vec<bool>,
    /// Ids of `<0x00>` ... `<0xFF>`, if the vocabulary has all of them.
    bytes: Option<Vec<u32>>,
    unknown: Option<u32>,
    add_space_prefix: bool,
}

/// A run of the text, linked with its neighbours; `len` 0 marks one that was merged away.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32,
    previous: u32,
    next: u32,
}

/// Two neighbours whose text is a piece. Stale when their lengths no longer add up to `len`.
struct Merge {
    score: f32,
    left: u32,
    right: u32,
    len: u32,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

impl SentencePiece {
    pub fn new(
        tokens: Vec<String>,
        ids: AHashMap<String, u32>,
        scores: Vec<f32>,
        spellable: Vec<bool>,
        unknown: Option<u32>,
        add_space_prefix: bool,
    ) -> Self {
        let bytes = (0..=255u8).map(|byte| ids.get(&format!("<0x{byte:02X}>")).copied()).collect();
        Self { tokens, ids, scores, spellable, bytes, unknown, add_space_prefix }
    }

    fn piece(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied().filter(|&id| self.spellable[id as usize])
    }

    fn offer(&self, text: &str, symbols: &[Symbol], left: u32, queue: &mut BinaryHeap<Merge>) {
        if left == NONE {
            return;
        }
        let a = symbols[left as usize];
        if a.next == NONE {
            return;
        }
        let len = a.len + symbols[a.next as usize].len;
        let joined = &text[a.start as usize..(a.start + len) as usize];
        if let Some(id) = self.piece(joined) {
            queue.push(Merge { score: self.scores[id as usize], left, right: a.next, len });
        }
    }

    /// Merges until nothing fits, best score first and leftmost among equals.
    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start: start as u32,
                len: c.len_utf8() as u32,
                previous: if i == 0 { NONE } else { i as u32 - 1 },
                next: i as u32 + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut queue = BinaryHeap::new();
        for left in 0..symbols.len() as u32 {
            self.offer(text, &symbols, left, &mut queue);
        }
        while let Some(Merge { left, right, len, .. }) = queue.pop() {
            let (a, b) = (symbols[left as usize], symbols[right as usize]);
            if a.len == 0 || b.len == 0 || a.len + b.len != len {
                continue;
            }
            symbols[left as usize].len = len;
            symbols[left as usize].next = b.next;
            symbols[right as usize].len = 0;
            if b.next != NONE {
                symbols[b.next as usize].previous = left;
            }
            self.offer(text, &symbols, a.previous, &mut queue);
            self.offer(text, &symbols, left, &mut queue);
        }
        symbols.retain(|symbol| symbol.len > 0);
        symbols
    }

    fn ids_of(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut after_unknown = false;
        for symbol in self.merge(text) {
            let part = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            let mut is_unknown = false;
            if let Some(id) = self.piece(part) {
                ids.push(id);
            } else if let Some(bytes) = &self.bytes {
                ids.extend(part.bytes().map(|byte| bytes[byte as usize]));
            } else {
                is_unknown = true;
                // A run of unknown characters is one token.
                if !after_unknown {
                    ids.extend(self.unknown);
                }
            }
            after_unknown = is_unknown;
        }
        ids
    }
}

impl Model for SentencePiece {
    type Trainer = BpeTrainer;

    /// `sequence`: the text between two special tokens, as the user wrote it.
    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let mut text = String::with_capacity(sequence.len() + 8);
        if self.add_space_prefix {
            text.push_str(SPACE);
        }
        text.push_str(&sequence.replace(' ', SPACE));
        if text.len() >= NONE as usize {
            return Err("expected a text of less than 4 GiB".into());
        }
        let ids = self.ids_of(&text);
        Ok(ids.into_iter().map(|id| Token::new(id, String::new(), (0, 0))).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokens.get(id as usize).cloned()
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.ids.iter().map(|(token, id)| (token.clone(), *id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.tokens.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a SentencePiece model is read-only".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}
