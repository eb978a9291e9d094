"""Recurrent modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Recurrent(nn.Module):
    """A stem, recurrent layers, a head on every step and one on the last state."""

    def __init__(self, kind, width=8, hidden=6, **options):
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.body = kind(width, hidden, batch_first=True, **options)
        size = options.get("proj_size") or hidden
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(size * directions, 3)
        self.last = nn.Linear(size, 2)

    def forward(self, x):
        y, state = self.body(F.relu(self.stem(x)))
        last = state[0] if isinstance(state, tuple) else state
        return self.head(y), self.last(last[-1])


def lstm():
    return Recurrent(nn.LSTM)


def lstm_stacked():
    return Recurrent(nn.LSTM, num_layers=2)


def lstm_bidirectional():
    return Recurrent(nn.LSTM, bidirectional=True, num_layers=2, bias=False)


def lstm_projected():
    return Recurrent(nn.LSTM, hidden=10, proj_size=6, num_layers=2)


def gru():
    return Recurrent(nn.GRU)


def gru_stacked():
    return Recurrent(nn.GRU, num_layers=2, bidirectional=True)


def rnn_tanh():
    return Recurrent(nn.RNN, num_layers=2)


def rnn_relu():
    return Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True)


class Speech(nn.Module):
    """Convolutions over a spectrogram, folded into the width of a GRU, time first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, (2, 1), 1)
        self.body = nn.GRU(6 * 4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = x.flatten(1, 2).permute(2, 0, 1)
        return self.head(self.body(x)[0])


def speech():
    return Speech()


class Sequence(nn.Module):
    """Encoder and decoder: the last state of one starts the other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(5, 8, batch_first=True)
        self.decoder = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, y):
        _, state = self.encoder(x)
        return self.head(self.decoder(y, state)[0])


def sequence():
    return Sequence()


class Cells(nn.Module):
    """An LSTM cell and a GRU cell in a Python loop."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LSTMCell(5, 8), nn.GRUCell(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 8)
        g = x.new_zeros(x.shape[0], 6)
        for i in range(x.shape[1]):
            h, c = self.one(x[:, i], (h, c))
            g = self.two(h, g)
        return self.head(g)


def cells():
    return Cells()


class Gates(nn.Module):
    """An LSTM step written by hand: four gates in one weight."""

    def __init__(self, hidden=8):
        super().__init__()
        self.input, self.hidden = nn.Linear(5, 4 * hidden), nn.Linear(hidden, 4 * hidden)
        self.head = nn.Linear(hidden, 3)
        self.size = hidden

    def forward(self, x):
        h = c = torch.zeros(x.shape[0], self.size, dtype=x.dtype)
        for step in x.unbind(1):
            i, f, g, o = (self.input(step) + self.hidden(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


def gates():
    return Gates()
